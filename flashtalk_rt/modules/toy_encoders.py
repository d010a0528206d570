"""The embedded toy's stand-ins for wav2vec2, CLIP and umT5: fixed formulas, no learnt weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured over synthetic speech at -23 LUFS; espeak-ng voices come within 0.03 of both.
_LOG_MEAN = -0.65
_LOG_STD = 0.87
_POWER_FLOOR = 0.05  # about where the mouth shuts: what is fainter would only tell voices apart


def mel_filters(sample_rate_hz: int, n_fft: int, mels: int) -> Tensor:
    """Triangular filters on the HTK mel scale, m = 2595 log10(1 + f / 700), 0 Hz to Nyquist, peak 1.

    Returns [n_fft // 2 + 1, mels] float32.
    """
    top = 2595 * math.log10(1 + sample_rate_hz / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, sample_rate_hz / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters: Tensor = torch.minimum(rising, falling).clamp(min=0).float()
    return filters


class MelAudioEncoder:
    """Log-mel energies: `subframes` spectra a video frame, 25 ms Hann windows.

    Video frame f owns samples [f*n, (f+1)*n), n = sample_rate_hz / fps; its sub-frames divide that span
    evenly and each window is centred on its own share, so nothing is late. Sound outside the clip is zero.
    """

    def __init__(self, sample_rate_hz: int, fps: int, mels: int = 40, subframes: int = 4) -> None:
        if sample_rate_hz % (fps * subframes):
            raise ValueError(f"{sample_rate_hz} Hz does not divide into {subframes} sub-frames at {fps} fps")
        self.subframes = subframes
        self.mels = mels
        self._hop = sample_rate_hz // fps // subframes
        self._window = torch.hann_window(sample_rate_hz // 40)
        self._filters = mel_filters(sample_rate_hz, self._window.numel(), mels)

    def __call__(self, samples: Tensor, frames: int) -> Tensor:
        """samples [N] or [B, N] float32 at -23 LUFS, N exactly `frames` video frames (else ValueError).

        Returns [frames, subframes, mels] or [B, frames, subframes, mels] float32, about zero mean and unit
        variance over speech; silence is a constant near -0.75, and nothing is lower.
        """
        expected = frames * self.subframes * self._hop
        if samples.shape[-1] != expected:
            raise ValueError(f"{frames} frames need {expected} samples, got {samples.shape[-1]}")
        window = self._window.to(samples.device)
        margin = (window.numel() - self._hop) // 2
        pieces = F.pad(samples.float(), (margin, margin)).unfold(-1, window.numel(), self._hop)
        power = torch.fft.rfft(pieces * window).abs().square() @ self._filters.to(samples.device)
        log_mel: Tensor = (torch.log10(power + _POWER_FLOOR) - _LOG_MEAN) / _LOG_STD
        return log_mel.reshape(*samples.shape[:-1], frames, self.subframes, self.mels)


class PatchImageEncoder:
    """The portrait as its own pixels: a grid of small patches and their mean."""

    def __init__(self, grid: int = 16, patch: int = 3) -> None:
        self.grid = grid
        self.patch = patch

    def __call__(self, image: Tensor) -> Tensor:
        """image [B, 3, 1, H, W] in [-1, 1] -> [B, 1 + grid^2, 3 patch^2] float32, the mean token first.

        The image is averaged down to grid*patch pixels a side; patches run row by row, and a patch is laid
        out as (channel, row, column).
        """
        side = self.grid * self.patch
        small = F.interpolate(image[:, :, 0].float(), (side, side), mode="area")
        tokens = F.unfold(small, self.patch, stride=self.patch).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


class NullTextEncoder:
    """The toy knows no language: every prompt is the empty one."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, prompt: str) -> Tensor:
        """-> [0, dim] float32, whatever the prompt."""
        return torch.zeros(0, self.dim)

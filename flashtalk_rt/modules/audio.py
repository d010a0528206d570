"""What happens to sound before an audio encoder sees it: the ring, BS.1770 loudness, feature windows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

_BLOCK_S = 0.4  # gating block, BS.1770-4
_OVERLAP = 0.75
_ABSOLUTE_GATE_LUFS = -70.0
_RELATIVE_GATE_LU = -10.0
_OFFSET_LU = -0.691
_TRUSTED_LUFS = 100.0  # published behaviour: a measurement beyond this is not acted on
_RINGING_S = 0.2  # the K-weighting's slowest poles (38 Hz, Q 0.5) have decayed by 200 dB after 0.1 s


def _k_weighting(n: int, sample_rate_hz: int, device: torch.device) -> Tensor:
    """Frequency response of the two K-weighting biquads at the bins of an n-point rfft, complex128.

    A 4 dB high shelf at 1500 Hz (Q 1/sqrt 2) and a high-pass at 38 Hz (Q 1/2), in the bilinear forms of
    the RBJ audio EQ cookbook; pyloudnorm computes them so for every rate.
    """
    amp = 10 ** (4.0 / 40)
    w = 2 * math.pi * 1500.0 / sample_rate_hz
    cos = math.cos(w)
    root = math.sqrt(2 * amp) * math.sin(w)  # the cookbook's 2 sqrt(A) alpha at Q = 1/sqrt 2
    up, down = amp + 1, amp - 1
    shelf_b = [amp * (up + down * cos + root), -2 * amp * (down + up * cos), amp * (up + down * cos - root)]
    shelf_a = [up - down * cos + root, 2 * (down - up * cos), up - down * cos - root]

    w = 2 * math.pi * 38.0 / sample_rate_hz
    cos, alpha = math.cos(w), math.sin(w)  # alpha = sin(w) / 2Q, Q = 1/2
    pass_b = [(1 + cos) / 2, -(1 + cos), (1 + cos) / 2]
    pass_a = [1 + alpha, -2 * cos, 1 - alpha]

    taps = torch.tensor([shelf_b, pass_b, shelf_a, pass_a], dtype=torch.float64, device=device)
    shelf_num, pass_num, shelf_den, pass_den = torch.fft.rfft(taps, n=n).unbind()
    response: Tensor = shelf_num * pass_num / (shelf_den * pass_den)
    return response


def loudness_lufs(samples: Tensor, sample_rate_hz: int) -> Tensor:
    """Integrated loudness of mono sound, ITU-R BS.1770-4 (K weighting, 400 ms blocks, both gates).

    samples: [..., N] float, at least 0.4 s long (else InputError). Returns [...] float64, LUFS; -inf where
    every block is under the absolute gate. Nothing is synchronised with the host.

    The biquads are applied as their exact response on a zero-padded FFT in float64. The only error is the
    impulse response that wraps around after 0.2 s of padding, more than 300 dB down.
    """
    n = samples.shape[-1]
    if n < _BLOCK_S * sample_rate_hz:
        raise InputError(
            f"loudness needs at least {_BLOCK_S} s of sound, got {n / sample_rate_hz:.3f} s; pad with zeros"
        )
    padded = n + math.ceil(_RINGING_S * sample_rate_hz)
    padded = math.ceil(padded / 4096) * 4096  # a length the FFT factors well
    weight = _k_weighting(padded, sample_rate_hz, samples.device)
    weighted = torch.fft.irfft(torch.fft.rfft(samples.double(), n=padded) * weight, n=padded)[..., :n]

    # Block bounds are rounded as pyloudnorm rounds them, so rates whose blocks are not whole samples agree.
    step = 1.0 - _OVERLAP
    blocks = round((n / sample_rate_hz - _BLOCK_S) / (_BLOCK_S * step)) + 1
    starts = [int(_BLOCK_S * (j * step) * sample_rate_hz) for j in range(blocks)]
    ends = [min(n, int(_BLOCK_S * (j * step + 1) * sample_rate_hz)) for j in range(blocks)]
    bounds = torch.tensor([starts, ends], device=samples.device)
    energy = F.pad(weighted.square().cumsum(-1), (1, 0))
    power = (energy[..., bounds[1]] - energy[..., bounds[0]]) / (_BLOCK_S * sample_rate_hz)

    block_lufs = _OFFSET_LU + 10 * torch.log10(power)
    gated = block_lufs >= _ABSOLUTE_GATE_LUFS
    relative = _mean_lufs(power, gated) + _RELATIVE_GATE_LU
    return _mean_lufs(power, gated & (block_lufs > relative[..., None]))


def _mean_lufs(power: Tensor, kept: Tensor) -> Tensor:
    """Loudness of the mean power of the kept blocks, -inf where none is kept."""
    mean = (power * kept).sum(-1) / kept.sum(-1).clamp(min=1)
    return _OFFSET_LU + 10 * torch.log10(mean)


def normalize_loudness(samples: Tensor, sample_rate_hz: int, target_lufs: float) -> Tensor:
    """Scale sound to `target_lufs`; silence (measured beyond +-100 LUFS) is returned as it is.

    samples: [..., N] float; every leading index gets a gain of its own. Returns the same shape and dtype.
    As published, a plain gain: peaks may pass 1 and are not clipped.
    """
    measured = loudness_lufs(samples, sample_rate_hz)
    gain = 10 ** ((target_lufs - measured) / 20)
    gain = torch.where(measured.abs() > _TRUSTED_LUFS, torch.ones_like(gain), gain)
    return samples * gain[..., None].to(samples.dtype)


def audio_windows(features: Tensor, frames: int, window: int = 5) -> Tensor:
    """The chunk's audio input: the ring's last `frames` frames, each with its neighbours.

    features: [F, blocks, dim]. Returns [1, frames, window, blocks, dim], same dtype. Neighbours are taken
    from the whole ring; past its ends the end frame repeats. `window` is odd; frames <= F (ValueError).
    """
    total = features.shape[0]
    if not 0 < frames <= total or window % 2 != 1:
        raise ValueError(f"cannot take {frames} frames with a window of {window} from {total} audio frames")
    centre = torch.arange(total - frames, total, device=features.device)
    offset = torch.arange(window, device=features.device) - window // 2
    return features[(centre[:, None] + offset).clamp(0, total - 1)][None]


class AudioRing:
    """The last `ring_s` seconds of a stream, zero before its start. Memory does not grow.

    Holds float32 mono sound at `sample_rate_hz` on `device`.
    """

    def __init__(self, ring_s: float, sample_rate_hz: int, device: torch.device | str = "cpu") -> None:
        self._samples = torch.zeros(round(ring_s * sample_rate_hz), device=device)

    def push(self, samples: Tensor) -> None:
        """Append samples [n], any length and float dtype; the oldest fall out.

        NaN, infinite or not one-dimensional sound raises InputError and leaves the ring unchanged.
        """
        if samples.ndim != 1 or not samples.is_floating_point():
            raise InputError(
                f"audio must be mono float samples [n], got {samples.dtype} of shape {list(samples.shape)}; "
                "mix the channels and scale to [-1, 1] first"
            )
        finite = torch.isfinite(samples)
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            raise InputError(
                f"audio sample {at} of {samples.numel()} is {float(samples[at])}; it must be finite"
            )
        new = samples[-self._samples.numel() :].to(self._samples)
        self._samples = torch.cat([self._samples[new.numel() :], new])

    def samples(self) -> Tensor:
        """The whole ring [ring_s * sample_rate_hz], float32, oldest first. A copy."""
        return self._samples.clone()

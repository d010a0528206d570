"""The probe: a small CNN that reads identity and motion back from a picture of the world.

It is trained on renders and VAE reconstructions only, never on generated frames, so that a
generator cannot have been its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import CheckpointError
from ...modules.precision import autocast
from .face import IDENTITY_NAMES, MOTION_NAMES, cavity_height, render, sample_identities
from .motion import sample_motion

PROBE_SIZE = 96  # pixels; other sizes are resampled to it
_WIDTHS = (32, 64, 96, 128)
_SIGNED = ("yaw", "pitch", "roll", "shift_x", "shift_y", "gaze_x", "gaze_y")
_SCORE_BATCH = 256  # frames


class Reading(NamedTuple):
    """What the probe sees: motion [B, 10] and identity [B, 12] float32, in the renderer's own units."""

    motion: Tensor
    identity: Tensor


class Sample(NamedTuple):
    """A training batch: frames [B, 3, H, W] in [-1, 1], motion [B, 10], identity [B, 12], one device."""

    frames: Tensor
    motion: Tensor
    identity: Tensor


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class Probe(nn.Module):
    """Frames [B, 3, H, W] in [-1, 1] -> Reading.  1.2M parameters, 6 ms a frame on one CPU core.

    Positions matter (gaze is two pixels), so the last 6 x 6 map is flattened, not averaged.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for width in _WIDTHS:
            layers += [nn.Conv2d(previous, width, 3, stride=2, padding=1), _Residual(width)]
            previous = width
        side = PROBE_SIZE // 2 ** len(_WIDTHS)
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(8, previous), nn.SiLU(), nn.Conv2d(previous, 48, 1))
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(48 * side * side, 256), nn.SiLU(),
            nn.Linear(256, len(MOTION_NAMES) + len(IDENTITY_NAMES)),
        )  # fmt: skip
        # Outputs start at the middle of each range and span it with unit activations.
        low, high = _ranges()
        self.register_buffer("centre", (low + high) / 2, persistent=False)
        self.register_buffer("span", (high - low) / math.sqrt(12), persistent=False)
        self.centre: Tensor
        self.span: Tensor

    def standardised(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, H, W] -> [B, 22], motion then identity, in units of a uniform's deviation."""
        if frames.shape[-2:] != (PROBE_SIZE, PROBE_SIZE):
            frames = F.interpolate(frames, (PROBE_SIZE, PROBE_SIZE), mode="bilinear", antialias=True)
        # Convolutions follow the layout of their input; this one is twice as fast on a CPU.
        out: Tensor = self.head(self.trunk(frames.contiguous(memory_format=torch.channels_last)))
        return out

    def forward(self, frames: Tensor) -> Reading:
        values = self.standardised(frames) * self.span + self.centre
        return Reading(values[:, : len(MOTION_NAMES)], values[:, len(MOTION_NAMES) :])


def _ranges() -> tuple[Tensor, Tensor]:
    """Lowest and highest value of the 22 parameters, motion then identity."""
    low = torch.tensor([-1.0 if name in _SIGNED else 0.0 for name in MOTION_NAMES + IDENTITY_NAMES])
    return low, torch.ones_like(low)


def random_sample(batch: int, size: int, generator: torch.Generator, held_out: bool = False) -> Sample:
    """`batch` independent renders of size x size pixels, on the generator's device.

    Half of the motion is drawn as in speech-free clips, half uniformly over the whole range; the mouth
    is always uniform, so rare openings and corners of the pose are seen as often as common ones.
    """
    device = generator.device
    identity = sample_identities(batch, generator, held_out)
    natural = sample_motion(batch, 1, generator, device)[:, 0]
    low, high = (bound[: len(MOTION_NAMES)].to(device) for bound in _ranges())
    uniform = low + (high - low) * torch.rand(natural.shape, generator=generator, device=device)
    keep = torch.rand(batch, 1, generator=generator, device=device) < 0.5
    motion = torch.where(keep, natural, uniform)
    motion[:, -2:] = uniform[:, -2:]
    return Sample(render(identity, motion[:, None], size, size)[:, 0], motion, identity)


def train_probe(
    probe: Probe,
    source: Callable[[], Sample],
    steps: int,
    *,
    peak_lr: float = 1.5e-3,
    augment: Callable[[Tensor], Tensor] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Fit `probe` in place for `steps` batches of `source`; returns the loss of every step.

    `augment` maps frames to frames of the same shape without gradient (mix VAE reconstructions in
    here). The loss is the mean square error in units of each parameter's uniform deviation (1 is
    chance). AdamW under a one-cycle schedule, bf16 where the device has it. `on_step(step, loss)` is called
    every 50 steps, the only time the loop waits for the device.
    """
    device = next(probe.parameters()).device
    optimiser = torch.optim.AdamW(probe.parameters(), lr=peak_lr, weight_decay=0.01, betas=(0.9, 0.98))
    total = max(steps, 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak_lr, total_steps=total, pct_start=0.1)
    losses: list[Tensor] = []
    probe.train()
    for step in range(steps):
        with torch.no_grad():
            frames, motion, identity = source()
            if augment is not None:
                frames = augment(frames)
            target = (torch.cat([motion, identity], -1) - probe.centre) / probe.span
        with autocast(device):
            predicted = probe.standardised(frames)
        loss = F.mse_loss(predicted.float(), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.detach())
        if on_step is not None and step % 50 == 0:
            on_step(step, loss.item())
    probe.eval()
    return torch.stack(losses).tolist() if losses else []


def save_probe(probe: Probe, path: str | Path) -> None:
    """Write the weights as one safetensors file."""
    save_file({name: value.contiguous() for name, value in probe.state_dict().items()}, str(path))


def load_probe(path: str | Path, device: torch.device | str = "cpu") -> Probe:
    """Read what `save_probe` wrote; CheckpointError when the file is missing or of another layout."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no probe there; train one with `flashtalk train world-probe`")
    probe = Probe()
    try:
        probe.load_state_dict(load_file(str(path)))
    except Exception as error:
        raise CheckpointError(f"{path}: not a probe of this version ({error}); train it again") from error
    return probe.to(device).eval()


@torch.no_grad()
def read_frames(probe: Probe, frames: Tensor) -> Reading:
    """Read clips: frames [..., 3, H, W] -> motion [..., 10] and identity [..., 12], batch by batch."""
    lead = frames.shape[:-3]
    parts = [probe(part.float()) for part in frames.reshape(-1, *frames.shape[-3:]).split(_SCORE_BATCH)]
    motion, identity = (torch.cat(column) for column in zip(*parts, strict=True))
    return Reading(motion.reshape(*lead, -1), identity.reshape(*lead, -1))


def probe_scores(probe: Probe, identities: Tensor, motion: Tensor, frames: Tensor) -> dict[str, float]:
    """Score the probe on identities [N, 12], motion [N, T, 10], frames [N, T, 3, H, W].

    Returns R^2 (1 - squared error / variance of the truth, over all N * T frames) under every
    parameter's name, NaN for a parameter that does not vary in the truth; `identity_mean` and
    `motion_mean`, the means over the parameters that vary; and `mouth_open_cavity_r`, Pearson's r
    between the predicted opening and `cavity_height`. No palette wraps around, so hues are scored as
    plain numbers.
    """
    predicted = read_frames(probe, frames)
    truth = identities[:, None].expand(-1, motion.shape[1], -1)
    scores: dict[str, float] = {}
    for group, names, found, true in (
        ("motion_mean", MOTION_NAMES, predicted.motion, motion),
        ("identity_mean", IDENTITY_NAMES, predicted.identity, truth),
    ):
        values = _r2(found.flatten(0, 1), true.flatten(0, 1))
        scores |= dict(zip(names, values.tolist(), strict=True))
        scores[group] = values.nanmean().item()
    opening = predicted.motion[..., MOTION_NAMES.index("mouth_open")]
    pair = torch.stack([opening.flatten(), cavity_height(frames.float()).flatten()])
    scores["mouth_open_cavity_r"] = torch.corrcoef(pair)[0, 1].item()
    return scores


def _r2(found: Tensor, true: Tensor) -> Tensor:
    """Coefficient of determination a column: [M, P] twice -> [P]; NaN where the truth is constant."""
    spread = (true - true.mean(0)).square().mean(0)
    error = (found - true).square().mean(0)
    return torch.where(spread > 1e-8, 1 - error / spread.clamp(min=1e-8), torch.nan)

"""Stage 1: supervised flow matching on chunks (arXiv 2512.23379).

x_t = (1 - t) x + t noise, v = noise - x.  One noise level for all frames of a clip; the motion
latents stay clean and leave the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..modules.audio import audio_windows
from ..modules.dit import DiT
from ..modules.schedule import shift_time


class FlowBatch(NamedTuple):
    """What one flow-matching step needs, batch first."""

    target: Tensor  # [B, z, T, h, w] clean latent
    noise: Tensor  # [B, z, T, h, w] standard normal
    t: Tensor  # [B] noise levels in [0, 1)
    motion: Tensor  # [B, z, m, h, w] the past, clean
    y: Tensor  # [B, 4 + z, T, h, w]
    text: Tensor  # [B, L, text_dim]
    image: Tensor  # [B, tokens, image_dim]
    audio: Tensor  # [B, frames, window, blocks, dim]
    weight: Tensor  # [1, 1, 1, h, w] of a place in the loss, mean 1; of no sample, so it biases nothing


def sample_times(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels [count] in [0, 1): uniform, then shifted as the sampler's are (`shift_time`)."""
    uniform = torch.rand(count, generator=generator, device=generator.device)
    return shift_time(uniform, shift)


def flow_matching_loss(dit: DiT, batch: FlowBatch) -> Tensor:
    """Weighted mean square error of the predicted velocity over the new frames."""
    level = batch.t.view(-1, 1, 1, 1, 1)
    kept = batch.motion.shape[2]
    noisy = (1 - level) * batch.target + level * batch.noise
    noisy = torch.cat((batch.motion, noisy[:, :, kept:]), dim=2)
    context = dit.context(batch.text, batch.image)
    audio = dit.audio_context(batch.audio)
    velocity = dit(noisy, batch.t * 1000, batch.y, context, audio)
    error = velocity.float() - (batch.noise - batch.target)
    loss: Tensor = (batch.weight * error[:, :, kept:].square()).mean()
    return loss


def drop_condition(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Zero a condition [B, ...] of random samples, so that the model also learns to do without."""
    keep = torch.rand(len(x), generator=generator, device=x.device) >= probability
    return x * keep.view(-1, *([1] * (x.ndim - 1)))


def batch_windows(features: Tensor, frames: int, window: int) -> Tensor:
    """`audio_windows` for a batch: [B, F, blocks, dim] -> [B, frames, window, blocks, dim]."""
    stacked = audio_windows(features.transpose(0, 1).flatten(1, 2), frames, window)
    windows: Tensor = stacked[0].unflatten(2, (len(features), -1))
    return windows.permute(2, 0, 1, 3, 4)

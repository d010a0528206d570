"""The plain PyTorch meaning of the VAE's ops, in the inputs' own dtype: float64 stays float64.

Shapes are as in the public ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import rms_norm

# The published norm divides by max(|x|, 1e-12); |x| = sqrt(C) rms(x), so this only keeps an all-zero pixel
# zero, as that clamp does.
EPS = 1e-24


def add_residual(x: Tensor, bias: Tensor | None, shortcut: Tensor) -> Tensor:
    """x + bias + shortcut."""
    return (x if bias is None else x + bias.view(-1, 1, 1, 1)) + shortcut


def with_past(x: Tensor, past: Tensor | None) -> Tensor:
    """[past, x] along time, NDHWC; past None is two frames of zeros.  x [B, C, T, H, W]."""
    if past is None:
        past = x.new_zeros(*x.shape[:2], 2, *x.shape[3:])
    # Joined as NDHWC: of a slice and a whole torch.cat makes NCDHW, which the convolution then copies.
    return torch.cat((past.movedim(1, -1), x.movedim(1, -1)), dim=1).movedim(-1, 1)


def norm_silu(x: Tensor, gamma: Tensor, past: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """[past, silu(RMSNorm(x + bias))] along time."""
    if bias is not None:
        x = x + bias.view(-1, 1, 1, 1)
    return with_past(F.silu(rms_norm(x.movedim(1, -1), gamma, EPS)).movedim(-1, 1), past)


def add_norm_silu(
    x: Tensor, bias: Tensor | None, shortcut: Tensor, gamma: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum and [past, silu(RMSNorm(sum))]."""
    total = add_residual(x, bias, shortcut)
    return total, norm_silu(total, gamma, past)


def double_frames(x: Tensor, bias: Tensor | None) -> Tensor:
    """The two halves of the channels of x + bias, one after the other in time, as NDHWC."""
    if bias is not None:
        x = x + bias.view(-1, 1, 1, 1)
    halves: Tensor = x.movedim(1, -1).unflatten(-1, (2, -1))
    return halves.movedim(-2, 2).flatten(1, 2).movedim(-1, 1)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest-exact doubling of every frame's height and width, then a 3x3 convolution by weight
    [O, C, 3, 3]."""
    images = x.transpose(1, 2).flatten(0, 1)
    doubled = F.interpolate(images, scale_factor=2.0, mode="nearest-exact")
    out: Tensor = F.conv2d(doubled, weight, bias, padding=1).unflatten(0, (x.shape[0], x.shape[2]))
    return out.transpose(1, 2)


def interleave(phases: Tensor, bias: Tensor | None = None) -> Tensor:
    """phases [N, 4 O, H + 1, W + 1], bias [O] -> [N, O, 2 H, 2 W], channels-last: pixel (2 i + a, 2 j + b)
    is bias + phase 2 a + b at (i + a, j + b)."""
    images, channels, height, width = phases.shape
    height, width = height - 1, width - 1
    shape = (images, channels // 4, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last)
    for i, phase in enumerate(phases.chunk(4, dim=1)):
        a, b = divmod(i, 2)
        out[:, :, a::2, b::2] = phase[:, :, a : a + height, b : b + width]
    return out if bias is None else out + bias.view(-1, 1, 1)


def vae_head(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, past: Tensor | None,
    weight: Tensor, out_bias: Tensor, clamp: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The convolution of [past, silu(RMSNorm(x + bias + shortcut))], and that input's last two frames."""
    if shortcut is None:
        y = norm_silu(x, gamma, past, bias)
    else:
        _, y = add_norm_silu(x, bias, shortcut, gamma, past)
    out = F.conv3d(y, weight, out_bias, padding=(0, 1, 1))
    return (out.clamp(-1, 1) if clamp else out), y[:, :, -2:]


def pixel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v in float32 at least."""
    q, k, v, dtype = *(x if x.dtype == torch.float64 else x.float() for x in (q, k, v)), q.dtype
    scores: Tensor = q @ k.mT * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).to(dtype)

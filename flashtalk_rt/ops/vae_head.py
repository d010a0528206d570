"""The decoder's last layer: sum, RMSNorm, SiLU and the causal 3x3x3 convolution to RGB, memory-bound.

A tile with a halo would have to normalise its inputs up to 27 times, or share them between programs.  So each
pixel is read and normalised once, and multiplied at once by all its taps: what it contributes to the nine
pixels around it, already summed over time, is 27 numbers; a second pass adds up each pixel's nine.  At C 96
and 4 frames of 768 x 448: 0.53 GB of x and shortcut read, twice 0.15 GB for the 27 numbers (float32), 0.2 GB
for the past and the future, 1.0 GB in all: 0.34 ms at 3.0 TB/s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _flop
from . import reference_vae as reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for
from ._shapes import check_shape
from .conv3d import conv3d
from .norm_silu import add_norm_silu, check_operands, checked, norm_silu


@torch.library.custom_op("flashtalk_rt::vae_head", mutates_args=())
def _kernel(
    x: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    gamma: Tensor,
    past: Tensor | None,
    weight: Tensor,
    out_bias: Tensor,
    clamp: bool,
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import vae

    future = _future(x)
    frames = vae.head(x, bias, shortcut, gamma, past, weight, out_bias, clamp, future, reference.EPS)
    return frames, future


@_kernel.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    gamma: Tensor,
    past: Tensor | None,
    weight: Tensor,
    out_bias: Tensor,
    clamp: bool,
) -> tuple[Tensor, Tensor]:
    return _frames(x, weight), _future(x)


# As `_kernel`, but the future goes where the caller wants it, over the past maybe.
@torch.library.custom_op("flashtalk_rt::vae_head_into", mutates_args=("future",))
def _kernel_into(
    x: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    gamma: Tensor,
    past: Tensor | None,
    weight: Tensor,
    out_bias: Tensor,
    clamp: bool,
    future: Tensor,
) -> Tensor:
    from ..triton_kernels import vae

    return vae.head(x, bias, shortcut, gamma, past, weight, out_bias, clamp, future, reference.EPS)


@_kernel_into.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    gamma: Tensor,
    past: Tensor | None,
    weight: Tensor,
    out_bias: Tensor,
    clamp: bool,
    future: Tensor,
) -> Tensor:
    return _frames(x, weight)


def _frames(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]))


def _future(x: Tensor) -> Tensor:
    shape = (*x.shape[:2], 2, *x.shape[3:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


differentiate_through(_kernel, reference.vae_head)


def vae_head(
    x: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    gamma: Tensor,
    past: Tensor | None,
    weight: Tensor,
    out_bias: Tensor,
    clamp: bool,
    *,
    future: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(frames, future): the convolution of `add_norm_silu`'s result, and that input's last two frames.

    x, bias, shortcut (or None), gamma and past as in `add_norm_silu`; weight [O, C, 3, 3, 3] and out_bias
    [O], O a few (a pixel's 9 O contributions stay in registers); clamp: to [-1, 1].  Returns frames
    [B, O, T, H, W] and the next call's past [B, C, 2, H, W], in x's dtype.

    future: where that past goes and what is returned, its frames NDHWC; without a gradient.  It may be
    `past`.
    """
    check_operands("vae_head", x, bias, shortcut, gamma, past)
    outputs = weight.shape[0]
    check_shape("vae_head: weight", weight, outputs, x.shape[1], 3, 3, 3)
    check_shape("vae_head: out_bias", out_bias, outputs)
    if backend_for(SPEC, x.device, x.dtype, wanted=backend) == "triton":
        # Under autocast the parameters are wider than the activations.
        weight, out_bias = weight.to(x.dtype), out_bias.to(x.dtype)
        if future is None:
            return _kernel(x, bias, shortcut, gamma, past, weight, out_bias, clamp)  # type: ignore[no-any-return]
        checked("vae_head: future", future, x, 2)
        return _kernel_into(x, bias, shortcut, gamma, past, weight, out_bias, clamp, future), future
    if shortcut is None:
        y = norm_silu(x, gamma, past, bias, backend=backend)
    else:
        _, y = add_norm_silu(x, bias, shortcut, gamma, past, backend=backend)
    frames = conv3d(y, weight, out_bias, padding=(0, 1, 1))
    last = y[:, :, -2:]
    return (frames.clamp(-1, 1) if clamp else frames), (last if future is None else future.copy_(last))


def _case(
    batch: int,
    channels: int,
    frames: int,
    height: int,
    width: int,
    *,
    past: bool,
    bias: bool,
    clamp: bool,
    shortcut: bool = True,
) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def video(frames: int) -> Tensor:
            return normal(batch, frames, height, width, channels).to(dtype).permute(0, 4, 1, 2, 3)

        return {
            "x": video(frames),
            "bias": normal(channels).to(dtype) if bias else None,
            "shortcut": video(frames) if shortcut else None,
            "gamma": (1 + 0.2 * normal(channels)).to(dtype),
            "past": video(2) if past else None,
            "weight": (normal(3, channels, 3, 3, 3) / (27 * channels) ** 0.5).to(dtype),
            "out_bias": normal(3).to(dtype),
            "clamp": clamp,
        }

    on = {"past": past, "bias": bias, "clamp": clamp, "no shortcut": not shortcut}
    parts = [name for name, present in on.items() if present]
    return Case(f"{batch}x{channels}x{frames}x{height}x{width} {' '.join(parts)}".strip(), make)


SPEC = OpSpec(
    "vae_head",
    (TRITON, TORCH),
    function=vae_head,
    reference=reference.vae_head,
    cases=(
        _case(2, 12, 4, 5, 7, past=True, bias=True, clamp=True),
        _case(1, 96, 1, 7, 11, past=True, bias=True, clamp=False),
        _case(1, 7, 1, 3, 5, past=False, bias=False, clamp=False),
        _case(1, 12, 2, 3, 5, past=True, bias=False, clamp=True, shortcut=False),
    ),
    workload=_case(1, 96, 4, 768, 448, past=True, bias=True, clamp=True),
    flop=_flop.vae_head,
    gradients=("x", "bias", "shortcut", "gamma", "past", "weight", "out_bias"),
)

"""Nearest-exact 2x upsampling followed by a 3x3 convolution, as one 2x2 convolution on the small grid.

An upsampled pixel's 3x3 neighbourhood covers only 2x2 small pixels, so each of the four phases (even or odd
row, even or odd column) is a 2x2 convolution whose weights are sums of the 3x3 ones: 2.25 times fewer
operations, and the upsampled intermediate never exists.  The four run as one convolution with four times the
outputs; a pass then interleaves their pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _flop
from . import reference_vae as reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for
from ._shapes import check_shape, check_video


@torch.library.custom_op("flashtalk_rt::interleave", mutates_args=())
def _kernel(phases: Tensor, bias: Tensor) -> Tensor:
    from ..triton_kernels import vae

    return vae.interleave(phases, bias)


@_kernel.register_fake
def _(phases: Tensor, bias: Tensor) -> Tensor:
    images, channels, height, width = phases.shape
    shape = (images, channels // 4, 2 * height - 2, 2 * width - 2)
    return torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last)


def _plain(phases: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (reference.interleave(phases, bias),)


differentiate_through(_kernel, _plain)


def fold_upsampled(weight: Tensor) -> Tensor:
    """The four phases' weights: [O, C, 3, 3] -> [4, O, C, 2, 2], phase 2 a + b for pixel (2 i + a, 2 j + b).

    Row 2 i reads small rows i - 1 (the first tap) and i (the other two), row 2 i + 1 rows i (the first two)
    and i + 1; columns alike.  Summed in float32 at least, returned in the weight's dtype, channels-last.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()

    def fold(w: Tensor, dim: int) -> Tensor:
        """The two phases of one axis, stacked in front."""
        first, middle, last = w.unbind(dim)
        even, odd = (first, middle + last), (first + middle, last)
        return torch.stack([torch.stack(taps, dim) for taps in (even, odd)])

    folded = fold(fold(wide, 2), 4).transpose(0, 1).flatten(0, 2).to(weight.dtype)
    result: Tensor = folded.contiguous(memory_format=torch.channels_last).unflatten(0, (4, -1))
    return result


def upsample_conv(x: Tensor, folded: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Every frame of x [B, C, T, H, W] doubled in height and width and convolved: [B, O, T, 2 H, 2 W].

    folded [4, O, C, 2, 2] from `fold_upsampled`, bias [O], x's dtype.  NDHWC x is read where it lies, and the
    result is NDHWC.
    """
    check_video("upsample_conv", x)
    outputs = bias.numel()
    check_shape("upsample_conv: folded", folded, 4, outputs, x.shape[1], 2, 2)
    check_shape("upsample_conv: bias", bias, outputs)
    images = x.transpose(1, 2).flatten(0, 1)
    taps = folded.flatten(0, 1)
    if backend_for(SPEC, x.device, x.dtype, wanted=backend) == "triton":
        out = _kernel(F.conv2d(images, taps, padding=1), bias)
    else:
        out = reference.interleave(F.conv2d(images, taps, bias.repeat(4), padding=1))
    video: Tensor = out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    return video


def _case(batch: int, channels: int, outputs: int, frames: int, height: int, width: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        return {
            "x": normal(batch, frames, height, width, channels).to(dtype).permute(0, 4, 1, 2, 3),
            "weight": (normal(outputs, channels, 3, 3) / (3 * channels**0.5)).to(dtype),
            "bias": normal(outputs).to(dtype),
        }

    return Case(f"{batch}x{channels}x{frames}x{height}x{width} to {outputs}", make)


def _folding(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    return upsample_conv(x, fold_upsampled(weight), bias, backend=backend)


SPEC = OpSpec(
    "upsample_conv",
    (TRITON, TORCH),
    function=_folding,
    reference=reference.upsample_conv,
    cases=(_case(2, 12, 6, 2, 5, 7), _case(1, 24, 96, 1, 1, 3)),
    workload=_case(1, 192, 96, 4, 384, 224),
    flop=_flop.upsample_conv,
    gradients=("x", "weight", "bias"),
)

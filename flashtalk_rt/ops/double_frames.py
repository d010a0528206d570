"""The end of doubling a video's frame rate: a convolution's two halves of channels become two frames each.

One pass adds the convolution's bias and puts the halves one after the other, where torch takes one for the
bias and one for the order, neither of which the convolution of the pictures behind it can do without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from . import reference_vae as reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for
from ._shapes import check_shape, check_video


@torch.library.custom_op("flashtalk_rt::double_frames", mutates_args=())
def _kernel(x: Tensor, bias: Tensor | None) -> Tensor:
    from ..triton_kernels import vae

    return vae.double_frames(x, bias)


@_kernel.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels // 2, 2 * frames, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def _plain(x: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    return (reference.double_frames(x, bias),)


differentiate_through(_kernel, _plain)


def double_frames(x: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """Frame 2 t is the first half of the channels of frame t of x + bias, frame 2 t + 1 the second.

    x [B, 2 C, T, H, W], bias [2 C], x's dtype -> [B, C, 2 T, H, W], NDHWC.
    """
    check_video("double_frames", x)
    if x.shape[1] % 2:
        raise InputError(f"double_frames: {x.shape[1]} channels have no two halves")
    check_shape("double_frames: bias", bias, x.shape[1])
    if backend_for(SPEC, x.device, x.dtype, wanted=backend) == "triton":
        return _kernel(x, bias)  # type: ignore[no-any-return]
    return reference.double_frames(x, bias)


def _case(batch: int, channels: int, frames: int, height: int, width: int, *, bias: bool) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        x = normal(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
        return {"x": x, "bias": normal(channels) if bias else None}

    return Case(f"{batch}x{channels}x{frames}x{height}x{width}{' bias' * bias}", make)


SPEC = OpSpec(
    "double_frames",
    (TRITON, TORCH),
    function=double_frames,
    reference=reference.double_frames,
    cases=(_case(2, 12, 3, 5, 7, bias=True), _case(1, 192, 1, 7, 3, bias=False)),
    workload=_case(1, 768, 2, 192, 112, bias=True),
    gradients=("x", "bias"),
)

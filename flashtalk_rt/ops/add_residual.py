"""A convolution's bias and a block's shortcut in one pass, where no norm follows to take them along."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference_vae as reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for
from ._shapes import check_shape, check_video


@torch.library.custom_op("flashtalk_rt::add_residual", mutates_args=())
def _kernel(x: Tensor, bias: Tensor | None, shortcut: Tensor) -> Tensor:
    from ..triton_kernels import vae

    return vae.add_residual(x, bias, shortcut)


@_kernel.register_fake
def _(x: Tensor, bias: Tensor | None, shortcut: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last_3d)


def _plain(x: Tensor, bias: Tensor | None, shortcut: Tensor) -> tuple[Tensor]:
    return (reference.add_residual(x, bias, shortcut),)


differentiate_through(_kernel, _plain)


def add_residual(x: Tensor, bias: Tensor | None, shortcut: Tensor, *, backend: str | None = None) -> Tensor:
    """x + bias + shortcut: x and shortcut [B, C, T, H, W], bias [C], one dtype.  The same shape and dtype,
    NDHWC on Triton: 3 passes over memory instead of 5."""
    check_video("add_residual", x)
    check_shape("add_residual: bias", bias, x.shape[1])
    check_shape("add_residual: shortcut", shortcut, *x.shape)
    if backend_for(SPEC, x.device, x.dtype, wanted=backend) == "triton":
        return _kernel(x, bias, shortcut)  # type: ignore[no-any-return]
    return reference.add_residual(x, bias, shortcut)


def _case(batch: int, channels: int, frames: int, height: int, width: int, *, bias: bool) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def video() -> Tensor:
            shape = (batch, frames, height, width, channels)
            return torch.randn(shape, generator=generator, device=device).to(dtype).permute(0, 4, 1, 2, 3)

        vector = torch.randn(channels, generator=generator, device=device).to(dtype)
        return {"x": video(), "bias": vector if bias else None, "shortcut": video()}

    return Case(f"{batch}x{channels}x{frames}x{height}x{width}{' bias' * bias}", make)


SPEC = OpSpec(
    "add_residual",
    (TRITON, TORCH),
    function=add_residual,
    reference=reference.add_residual,
    cases=(_case(2, 12, 4, 5, 7, bias=True), _case(1, 96, 1, 5, 3, bias=False)),
    workload=_case(1, 192, 4, 384, 224, bias=True),
    gradients=("x", "bias", "shortcut"),
)

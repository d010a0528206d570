"""What lies between two of the VAE's causal convolutions, in one pass: sum, RMSNorm, SiLU, cache.

The result is the next convolution's whole input: two frames of past, then the normalised frames, NDHWC.
Height and width are not padded: cuDNN and the TMA loads of `csrc` supply zeros beyond the edges at no cost,
where padded rows would have to be written and read.

Bytes: in frames of H x W x C, T of them a call.  Passes of their own read and write 2 T (bias), 2 T (norm),
2 T (SiLU) and 2 (T + 2) (cache) for each convolution, and 3 T for a block's shortcut: 19 T + 8 a block of
two convolutions.  Here it is 2 T + 4 between them (x and past read, out written) and 4 T + 4 at the block's
start (the shortcut read and the sum written too): 6 T + 8, at T = 4 32 instead of 84.  Of those 32, 8 carry
past frames, which decoding several latent frames a call would save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from . import reference_vae as reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for
from ._shapes import check_shape, check_video


@torch.library.custom_op("flashtalk_rt::norm_silu", mutates_args=())
def _kernel(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import vae

    out = _empty(x)
    return vae.norm_silu(x, bias, shortcut, gamma, past, out, reference.EPS), out


@_kernel.register_fake
def _(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _total(x, shortcut), _empty(x)


# As `_kernel`, but the second result goes where the caller wants it, its past maybe among it.
@torch.library.custom_op("flashtalk_rt::norm_silu_into", mutates_args=("out",))
def _kernel_into(
    x: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    gamma: Tensor,
    past: Tensor | None,
    out: Tensor,
) -> Tensor:
    from ..triton_kernels import vae

    return vae.norm_silu(x, bias, shortcut, gamma, past, out, reference.EPS)


@_kernel_into.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    gamma: Tensor,
    past: Tensor | None,
    out: Tensor,
) -> Tensor:
    return _total(x, shortcut)


def _empty(x: Tensor) -> Tensor:
    shape = (*x.shape[:2], x.shape[2] + 2, *x.shape[3:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def _total(x: Tensor, shortcut: Tensor | None) -> Tensor:
    ndhwc = torch.channels_last_3d
    return x.new_empty(0) if shortcut is None else torch.empty_like(x, memory_format=ndhwc)


def _plain(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor]:
    if shortcut is None:
        return x.new_empty(0), reference.norm_silu(x, gamma, past, bias)
    return reference.add_norm_silu(x, bias, shortcut, gamma, past)


differentiate_through(_kernel, _plain)


def norm_silu(
    x: Tensor,
    gamma: Tensor,
    past: Tensor | None,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """[past, silu(n)] along time, n = y / |y| * sqrt(C) * gamma over the channels of y = x + bias.

    x [B, C, T, H, W], T >= 1; gamma and bias [C]; past [B, C, 2, H, W] in x's dtype, None for zeros (the
    start of a video).  NDHWC x and past are read where they lie.  Returns [B, C, 2 + T, H, W] in x's dtype,
    NDHWC on Triton.

    Its last two frames are the next call's past: slice them, no copy is needed.  The slice keeps all 2 + T
    frames alive; copy it where that matters.

    out: where the result goes and what is returned, its frames NDHWC; without a gradient.  `past` may be the
    last two frames that it holds, so a call after the other in one buffer needs no copy at all.
    """
    check_operands("norm_silu", x, bias, None, gamma, past)
    if backend_for(NORM_SILU, x.device, x.dtype, wanted=backend) == "triton":
        if out is None:
            return _kernel(x, bias, None, gamma, past)[1]  # type: ignore[no-any-return]
        _kernel_into(x, bias, None, gamma, past, checked("norm_silu: out", out, x, x.shape[2] + 2))
        return out
    found = reference.norm_silu(x, gamma, past, bias)
    return found if out is None else out.copy_(found)


def add_norm_silu(
    x: Tensor,
    bias: Tensor | None,
    shortcut: Tensor,
    gamma: Tensor,
    past: Tensor | None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum s = x + bias + shortcut, and `norm_silu` of it; all as there, shortcut and s like x."""
    check_operands("add_norm_silu", x, bias, shortcut, gamma, past)
    if backend_for(ADD_NORM_SILU, x.device, x.dtype, wanted=backend) == "triton":
        if out is None:
            return _kernel(x, bias, shortcut, gamma, past)  # type: ignore[no-any-return]
        return _kernel_into(
            x, bias, shortcut, gamma, past, checked("norm_silu: out", out, x, x.shape[2] + 2)
        ), out
    total, found = reference.add_norm_silu(x, bias, shortcut, gamma, past)
    return total, (found if out is None else out.copy_(found))


def check_operands(
    op: str, x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, past: Tensor | None
) -> None:
    """InputError unless the shapes are those that `norm_silu` and `add_norm_silu` state."""
    check_video(op, x)
    batch, channels, _, height, width = x.shape
    check_shape(f"{op}: gamma", gamma, channels)
    check_shape(f"{op}: bias", bias, channels)
    check_shape(f"{op}: shortcut", shortcut, *x.shape)
    check_shape(f"{op}: past", past, batch, channels, 2, height, width)


def checked(name: str, out: Tensor, x: Tensor, frames: int) -> Tensor:
    """`out`, if it can take so many frames that go with x: InputError unless each of its videos, which may
    be slices of longer ones, lies in NDHWC."""
    shape = (*x.shape[:2], frames, *x.shape[3:])
    ndhwc = out[:1].is_contiguous(memory_format=torch.channels_last_3d)
    if out.shape != shape or out.dtype != x.dtype or not ndhwc:
        raise InputError(
            f"{name} is {out.dtype} {list(out.shape)} of strides {out.stride()}; it must be {x.dtype} "
            f"{list(shape)}, NDHWC"
        )
    return out


def _case(
    batch: int, channels: int, frames: int, height: int, width: int, *, past: bool, bias: bool, shortcut: bool
) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def video(frames: int, skipped: int = 0) -> Tensor:
            # Frames after the first `skipped` of a longer video: what a slice of an earlier result is.
            shape = (batch, skipped + frames, height, width, channels)
            drawn = torch.randn(shape, generator=generator, device=device).to(dtype)
            return drawn.permute(0, 4, 1, 2, 3)[:, :, skipped:]

        def vector() -> Tensor:
            return torch.randn(channels, generator=generator, device=device).to(dtype)

        made: dict[str, object] = {
            "x": video(frames),
            "gamma": 1 + 0.2 * vector(),
            "past": video(2, 3) if past else None,
            "bias": vector() if bias else None,
        }
        return {**made, "shortcut": video(frames)} if shortcut else made

    parts = [name for name, on in (("past", past), ("bias", bias), ("shortcut", shortcut)) if on]
    return Case(f"{batch}x{channels}x{frames}x{height}x{width} {' '.join(parts)}".strip(), make)


NORM_SILU = OpSpec(
    "norm_silu",
    (TRITON, TORCH),
    function=norm_silu,
    reference=reference.norm_silu,
    cases=(
        _case(2, 12, 4, 5, 7, past=True, bias=True, shortcut=False),
        _case(1, 96, 1, 7, 5, past=True, bias=False, shortcut=False),
        _case(1, 7, 1, 3, 3, past=False, bias=True, shortcut=False),
    ),
    workload=_case(1, 96, 4, 768, 448, past=True, bias=True, shortcut=False),
    gradients=("x", "gamma", "past", "bias"),
)
ADD_NORM_SILU = OpSpec(
    "add_norm_silu",
    (TRITON, TORCH),
    function=add_norm_silu,
    reference=reference.add_norm_silu,
    cases=(
        _case(2, 12, 4, 5, 7, past=True, bias=True, shortcut=True),
        _case(2, 96, 1, 5, 3, past=False, bias=False, shortcut=True),
    ),
    workload=_case(1, 96, 4, 768, 448, past=True, bias=True, shortcut=True),
    gradients=("x", "bias", "shortcut", "gamma", "past"),
)

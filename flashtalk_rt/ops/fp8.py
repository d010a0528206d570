"""float8 e4m3 with one scale a row: what the producing kernels emit and `linear_fp8` consumes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import TORCH, TRITON, Backend, Case, OpSpec, Situation, backend_for

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # its largest value


class Quantized(NamedTuple):
    """A tensor as data * scale: data [..., D] float8 e4m3, scale [..., 1] float32, a row its own."""

    data: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., D] in `dtype`."""
        return (self.data.float() * self.scale).to(dtype)


def scale_to(largest: Tensor, limit: float) -> Tensor:
    """largest / limit, but normal, so that a kernel may multiply by its reciprocal; 1 where all is zero."""
    scale = (largest / limit).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def _plain(x: Tensor, gelu: bool) -> Quantized:
    """What `quantize` means; every kernel that emits fp8 rounds its rows so."""
    rows = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = scale_to(rows.abs().amax(-1, keepdim=True), FP8_MAX)
    return Quantized((rows / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)


@torch.library.custom_op("flashtalk_rt::quantize", mutates_args=())
def _kernel(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import quantize

    return quantize.quantize(x, gelu)


@_kernel.register_fake
def _(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def quantize(x: Tensor, *, gelu: bool = False, backend: str | None = None) -> Quantized:
    """Round each row of x [..., D] to e4m3 by its largest magnitude: s = max|x| / 448, 1 for zeros.

    x: an activation, or a weight [N, K], whose rows are the output channels.  gelu: of gelu(x), in its
    tanh form, computed in float32 and rounded once, to e4m3.  There is no gradient.
    """
    if backend_for(SPEC, x.device, x.dtype, wanted=backend) == "triton":
        return Quantized(*_kernel(x.contiguous(), gelu))
    return _plain(x, gelu)


def _triton(situation: Situation) -> str | None:
    if situation.capability is not None and situation.capability < (8, 9):
        return "needs sm_89 or newer, this is sm_{}{}".format(*situation.capability)
    return TRITON.supports(situation)


def _case(*shape: int, gelu: bool, strided: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator, device=device).to(dtype)
        x = 2 * wide[..., shape[-1] :] if strided else (2 * wide[..., shape[-1] :]).contiguous()
        return {"x": x, "gelu": gelu}

    parts = ["x".join(map(str, shape)), *["gelu"] * gelu, *["strided"] * strided]
    return Case(" ".join(parts), make)


SPEC = OpSpec(
    "quantize",
    (Backend("triton", _triton), TORCH),
    function=quantize,
    reference=lambda x, gelu: F.gelu(x, approximate="tanh") if gelu else x,
    cases=(
        _case(2, 3, 256, gelu=False, strided=True),
        _case(5, 100, gelu=True),
        _case(1, 1, 7, gelu=True),
        _case(1, 2, 20000, gelu=True),  # wider than a block
    ),
    workload=_case(1, 12096, 13824, gelu=True),
)

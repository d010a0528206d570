"""The residual stream and the LayerNorm that reads it, in one pass over the row."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for
from .fp8 import Quantized, quantize


@torch.library.custom_op("flashtalk_rt::residual_norm", mutates_args=())
def _kernel(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, fp8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels import norms

    return norms.residual_norm(x, y, gate, weight, bias, eps, fp8)


@_kernel.register_fake
def _(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, fp8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if y is not None else x.new_empty(0),
        torch.empty_like(x, dtype=torch.float8_e4m3fn if fp8 else x.dtype),
        x.new_empty((*x.shape[:2], 1) if fp8 else 0, dtype=torch.float32),
    )


def _plain(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, fp8: bool
) -> tuple[Tensor, Tensor]:
    r, out = reference.residual_norm(x, y, gate, weight, bias, eps)
    return (x.new_empty(0) if y is None else r), out


differentiate_through(_kernel, _plain)


def residual_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    fp8: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | Quantized]:
    """The new residual stream and its normalised rows: r = x + y * gate, LayerNorm(r) * weight + bias.

    x, y [B, L, D], one dtype; y None leaves x as it is, gate None adds y whole.  gate [B, 1, D] float32.
    weight and bias [D], [1, 1, D] or [B, 1, D]: an affine norm's own, or a modulation's 1 + scale and shift.
    fp8: the second result is quantised by rows for `linear_fp8`; it then has no gradient.
    Returns (r [B, L, D], normalised [B, L, D]) in x's dtype.
    """
    if backend_for(SPEC, x.device, x.dtype, wanted=backend) == "triton":
        weight, bias = (v.reshape(-1, 1, x.shape[-1]).contiguous() for v in (weight, bias))
        r, out, scale = _kernel(x, y, gate, weight, bias, eps, fp8)
        r = x if y is None else r
        return r, Quantized(out, scale) if fp8 else out
    r, out = reference.residual_norm(x, y, gate, weight, bias, eps)
    return r, quantize(out) if fp8 else out


def _case(
    batch: int, length: int, width: int, *, y: bool, gate: bool, affine: bool, fp8: bool = False
) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(kind)

        modulation = (width,) if affine else (batch, 1, width)
        return {
            "x": normal(batch, length, width, kind=dtype) + 0.5,
            "y": normal(batch, length, width, kind=dtype) if y else None,
            "gate": normal(batch, 1, width) if gate else None,
            "weight": 1 + 0.2 * normal(*modulation),
            "bias": normal(*modulation),
            "eps": 1e-6,
            "fp8": fp8,
        }

    parts = [name for name, on in (("y", y), ("gate", gate), ("affine", affine), ("fp8", fp8)) if on]
    return Case(f"{batch}x{length}x{width} {' '.join(parts)}".strip(), make)


SPEC = OpSpec(
    "residual_norm",
    (TRITON, TORCH),
    function=residual_norm,
    reference=lambda fp8, **arguments: reference.residual_norm(**arguments),
    cases=(
        _case(2, 3, 256, y=True, gate=True, affine=False),
        _case(2, 5, 100, y=True, gate=False, affine=True),
        _case(1, 1, 7, y=False, gate=False, affine=False),
        _case(2, 3, 1540, y=True, gate=True, affine=False, fp8=True),
    ),
    workload=_case(1, 12096, 5120, y=True, gate=True, affine=False),
    gradients=("x", "y", "gate", "weight", "bias"),
)

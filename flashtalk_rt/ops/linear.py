"""Linear layers on float8 operands.  Inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from . import _flop
from ._dispatch import TORCH, Backend, Case, OpSpec, Situation, backend_for
from .fp8 import FP8, Quantized, quantize

MULTIPLE = 16  # of K and N: what torch._scaled_mm takes


def _plain(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `linear_fp8` means: the float32 product of the scaled operands, rounded once."""
    product = (x.data.float() @ weight.data.float().t()) * x.scale * weight.scale.t()
    return (product if bias is None else product + bias.float()).to(dtype)


def _scaled_mm(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Through cuBLAS on Hopper with CUDA 12.9 or newer, CUTLASS elsewhere.

    torch wants row-major by column-major, scales [M, 1] and [1, N] and a bias of the result's dtype.
    use_fast_accum leaves the sums in the tensor cores' accumulators, of about 14 bits of mantissa, instead of
    moving them to float32 every 128 products.  By estimate that loses some 1% of the result's size at
    K = 13,824, which adds in squares to the 3.7% that the operands' own rounding costs: not worth a slower
    product.  tests/test_linear_fp8.py bounds both on a GPU.
    """
    out = torch._scaled_mm(
        x.data.reshape(-1, x.data.shape[-1]),
        weight.data.t(),
        scale_a=x.scale.reshape(-1, 1),
        scale_b=weight.scale.t(),
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.view(*x.data.shape[:-1], -1)


def linear_fp8(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """(x.data @ weight.data^T) * x.scale * weight.scale^T + bias, in `dtype`.

    x.data [..., K] and weight.data [N, K] float8 e4m3 with scales [..., 1] and [N, 1] float32, from
    `quantize` or a kernel that emits fp8; bias [N] or None.  Returns [..., N].
    InputError: K or N no multiple of 16, shapes or dtypes that do not fit, or an operand that wants a
    gradient: there is none.
    """
    _check(x, weight, bias)
    if backend_for(SPEC, x.data.device, dtype, wanted=backend) == "scaled_mm":
        return _scaled_mm(x, weight, bias, dtype)
    return _plain(x, weight, bias, dtype)


def _check(x: Quantized, weight: Quantized, bias: Tensor | None) -> None:
    """InputError unless the operands are what `linear_fp8` takes."""
    if x.data.dtype != FP8 or weight.data.dtype != FP8:
        raise InputError(f"linear_fp8: operands are {x.data.dtype} and {weight.data.dtype}, not {FP8}")
    n, k = weight.data.shape
    if x.data.shape[-1] != k:
        raise InputError(f"linear_fp8: x has {x.data.shape[-1]} channels, the weight takes {k}")
    if k % MULTIPLE or n % MULTIPLE:
        raise InputError(f"linear_fp8: {k} -> {n} channels; both must be multiples of {MULTIPLE}")
    for name, operand in (("x", x), ("weight", weight)):
        rows = (*operand.data.shape[:-1], 1)
        if operand.scale.shape != rows or operand.scale.dtype != torch.float32:
            raise InputError(
                f"linear_fp8: {name}'s scale is {operand.scale.dtype} {tuple(operand.scale.shape)}, "
                f"not torch.float32 {rows}"
            )
    if bias is not None and bias.shape != (n,):
        raise InputError(f"linear_fp8: the bias is {tuple(bias.shape)}, not {(n,)}")
    operands = (*x, *weight, *([] if bias is None else [bias]))
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        raise InputError("linear_fp8 has no gradient: call it under torch.no_grad(), or train in bfloat16")


def _supports(situation: Situation) -> str | None:
    if situation.device_type != "cuda":
        return f"needs a CUDA device, this is {situation.device_type}"
    if situation.capability is None or situation.capability < (8, 9):
        return f"needs sm_89 or newer, this is {situation.capability}"
    if situation.dtype != torch.bfloat16:
        return f"needs a bfloat16 result, this is {situation.dtype}"
    return None


def _case(*shape: int, k: int, n: int, bias: bool = True) -> Case:
    """x [*shape, k] -> [*shape, n]."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        return {
            "x": quantize(normal(*shape, k), backend="torch"),
            "weight": quantize(normal(n, k) * k**-0.5, backend="torch"),
            "bias": normal(n).to(dtype) if bias else None,
            "dtype": dtype,
        }

    return Case(f"{'x'.join(map(str, shape))} {k}-{n}{'' if bias else ' no bias'}", make)


SPEC = OpSpec(
    "linear_fp8",
    (Backend("scaled_mm", _supports), TORCH),
    function=linear_fp8,
    reference=lambda x, weight, bias, dtype: _plain(x, weight, bias, torch.float32),
    eager=_plain,
    cases=(
        _case(2, 3, k=32, n=48),
        _case(1, 1, k=16, n=16, bias=False),
        _case(37, k=208, n=80),
    ),
    workload=_case(1, 12096, k=5120, n=5120),
    flop=_flop.linear_fp8,
)

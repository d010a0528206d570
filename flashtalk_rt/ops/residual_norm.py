"""The residual stream, its gated update and the LayerNorm that reads it, in one pass over the row."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..errors import InputError
from . import reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for
from .fp8 import FP8, Quantized, quantize


@torch.library.custom_op("flashtalk_rt::residual_norm", mutates_args=())
def _kernel(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels import norms

    return norms.residual_norm(x, y, gate, weight, bias, eps, fp8)


@_kernel.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = FP8 if fp8 else x.dtype
    return (
        torch.empty_like(x) if y is not None else x.new_empty(0),
        torch.empty_like(x, dtype=dtype) if weight is not None else x.new_empty(0, dtype=dtype),
        x.new_empty((*x.shape[:-1], 1) if fp8 else 0, dtype=torch.float32),
    )


def _plain(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    fp8: bool,
) -> tuple[Tensor, ...]:
    if weight is None or bias is None:
        assert y is not None and gate is not None  # gate_residual
        return (reference.gate_residual(x, y, gate),)
    r, out = reference.residual_norm(x, y, gate, weight, bias, eps)
    return (x.new_empty(0) if y is None else r), out.view_as(x)  # [L, D] meets parameters of [1, 1, D]


differentiate_through(_kernel, _plain)


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    fp8: bool,
) -> tuple[Tensor, Tensor | Quantized]:
    """Call the kernel on what it takes: contiguous rows, parameters [1 or B, 1, D]."""
    if y is not None and y.shape != x.shape:
        raise InputError(f"x is {tuple(x.shape)} and y {tuple(y.shape)}: they must be alike")
    y = None if y is None else y.contiguous()
    gate, weight, bias = (_parameter(v, x) for v in (gate, weight, bias))
    r, out, scale = _kernel(x.contiguous(), y, gate, weight, bias, eps, fp8)
    return r, Quantized(out, scale) if fp8 else out


def _parameter(v: Tensor | None, x: Tensor) -> Tensor | None:
    """[D], [1, 1, D] or [B, 1, D] -> [1 or B, 1, D], contiguous."""
    if v is None:
        return None
    if v.shape[-1] != x.shape[-1] or v.numel() not in (x.shape[-1], x.shape[0] * x.shape[-1]):
        raise InputError(f"x is {tuple(x.shape)}; a gate, weight or bias of {tuple(v.shape)} does not fit it")
    return v.reshape(-1, 1, x.shape[-1]).contiguous()


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
    Returns (r [B, L, D], normalised [B, L, D]) in x's dtype.  InputError: shapes that do not fit.
    """
    if backend_for(SPEC, x.device, x.dtype, wanted=backend) == "triton":
        r, out = _launch(x, y, gate, weight, bias, eps, fp8)
        return (x if y is None else r), out
    r, normed = reference.residual_norm(x, y, gate, weight, bias, eps)
    return r, quantize(normed, backend="torch") if fp8 else normed


@overload
def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    fp8: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, fp8: bool, backend: str | None = None
) -> Tensor | Quantized: ...
def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, fp8: bool = False, backend: str | None = None
) -> Tensor | Quantized:
    """LayerNorm without affine, then modulation: norm(x) * (1 + scale) + shift.

    x [B, L, D]; shift and scale [B, 1, D] float32.  Returns x's dtype; fp8 as in `residual_norm`.
    """
    if backend_for(ADALN, x.device, x.dtype, wanted=backend) == "triton":
        return _launch(x, None, None, 1 + scale, shift, eps, fp8)[1]
    normed = reference.adaln(x, shift, scale, eps)
    return quantize(normed, backend="torch") if fp8 else normed


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    fp8: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    fp8: bool,
    backend: str | None = None,
) -> Tensor | Quantized: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    fp8: bool = False,
    backend: str | None = None,
) -> Tensor | Quantized:
    """LayerNorm of x [..., D] with affine weight and bias [D] or None.

    Returns x's dtype; fp8 as in `residual_norm`.
    """
    if backend_for(LAYER_NORM, x.device, x.dtype, wanted=backend) == "triton":
        weight = x.new_ones(x.shape[-1]) if weight is None else weight
        bias = x.new_zeros(x.shape[-1]) if bias is None else bias
        return _launch(x, None, None, weight, bias, eps, fp8)[1]
    normed = reference.layer_norm(x, weight, bias, eps)
    return quantize(normed, backend="torch") if fp8 else normed


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """x + y * gate: x, y [B, L, D]; gate [B, 1, D] float32.  Returns x's dtype.

    No fp8: no matrix product reads the residual stream, only its norm, which `residual_norm(fp8=True)` gives.
    """
    if backend_for(GATE_RESIDUAL, x.device, x.dtype, wanted=backend) == "triton":
        return _launch(x, y, gate, None, None, eps=0.0, fp8=False)[0]
    return reference.gate_residual(x, y, gate)


def _case(
    batch: int, length: int, width: int, *, y: bool, gate: bool, affine: bool, fp8: bool = False
) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(kind)

        # As in the DiT, modulations are slices of one tensor.
        gates, scales, shifts = normal(batch, 3, width).chunk(3, dim=1)
        return {
            "x": normal(batch, length, width, kind=dtype) + 0.5,
            "y": normal(batch, length, width, kind=dtype) if y else None,
            "gate": gates if gate else None,
            "weight": 1 + 0.2 * (normal(width) if affine else scales),
            "bias": normal(width) if affine else shifts,
            "eps": 1e-6,
            "fp8": fp8,
        }

    parts = [name for name, on in (("y", y), ("gate", gate), ("affine", affine), ("fp8", fp8)) if on]
    return Case(f"{batch}x{length}x{width} {' '.join(parts)}".strip(), make)


def _of(case: Case, *names: str, **renamed: str) -> Case:
    """`case` with these of its arguments alone, the renamed ones as old=new."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        arguments = case.make(device, dtype, generator)
        return {renamed.get(name, name): arguments[name] for name in (*names, *renamed)}

    return Case(case.name, make)


def _transposed(case: Case) -> Case:
    """`case` with the layout of x that the patch embedding leaves: channels outermost."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        arguments = case.make(device, dtype, generator)
        return {**arguments, "x": arguments["x"].mT.contiguous().mT}

    return Case(f"{case.name} transposed", make)


SPEC = OpSpec(
    "residual_norm",
    (TRITON, TORCH),
    function=residual_norm,
    reference=lambda fp8, **arguments: reference.residual_norm(**arguments),
    cases=(
        _case(2, 3, 256, y=True, gate=True, affine=False),
        _case(2, 5, 100, y=True, gate=False, affine=True),
        _case(1, 1, 7, y=False, gate=False, affine=False),
        _transposed(_case(2, 3, 48, y=True, gate=True, affine=False)),
        _case(2, 3, 1540, y=True, gate=True, affine=False, fp8=True),
        _case(2, 7, 2048, y=True, gate=True, affine=False),  # whole parts of a row
        _case(1, 160, 1028, y=True, gate=True, affine=False, fp8=True),  # rows enough for a second turn
    ),
    workload=_case(1, 12096, 5120, y=True, gate=True, affine=False),
    gradients=("x", "y", "gate", "weight", "bias"),
)


def _adaln(*shape: int, fp8: bool = False) -> Case:
    case = _case(*shape, y=False, gate=False, affine=False, fp8=fp8)
    return _of(case, "x", "eps", "fp8", weight="scale", bias="shift")


ADALN = OpSpec(
    "adaln",
    (TRITON, TORCH),
    function=adaln,
    reference=lambda fp8, **arguments: reference.adaln(**arguments),
    cases=(_transposed(_adaln(2, 5, 48)), _adaln(1, 1, 7), _adaln(2, 3, 1540, fp8=True)),
    workload=_adaln(1, 12096, 5120),
    gradients=("x", "shift", "scale"),
)


def _layer_norm(*shape: int, fp8: bool = False) -> Case:
    case = _case(*shape, y=False, gate=False, affine=True, fp8=fp8)
    return _of(case, "x", "weight", "bias", "eps", "fp8")


def _bare(case: Case) -> Case:
    """`case` without affine parameters, on the first batch element's rows, [L, D]."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        arguments = case.make(device, dtype, generator)
        return {**arguments, "x": arguments["x"][0], "weight": None, "bias": None}

    return Case(f"{case.name} bare", make)


LAYER_NORM = OpSpec(
    "layer_norm",
    (TRITON, TORCH),
    function=layer_norm,
    reference=lambda fp8, **arguments: reference.layer_norm(**arguments),
    cases=(
        _transposed(_layer_norm(2, 5, 48)),
        _layer_norm(3, 1, 100),
        _bare(_layer_norm(1, 6, 40)),
        _layer_norm(2, 3, 1540, fp8=True),
    ),
    workload=_layer_norm(1, 12096, 5120),
    gradients=("x", "weight", "bias"),
)


def _gate_residual(*shape: int) -> Case:
    return _of(_case(*shape, y=True, gate=True, affine=True), "x", "y", "gate")


GATE_RESIDUAL = OpSpec(
    "gate_residual",
    (TRITON, TORCH),
    function=gate_residual,
    reference=reference.gate_residual,
    cases=(_gate_residual(2, 3, 256), _transposed(_gate_residual(2, 5, 100)), _gate_residual(1, 1, 7)),
    workload=_gate_residual(1, 12096, 5120),
    gradients=("x", "y", "gate"),
)

"""Normalisations of the DiT, a row (a token's channels) a program, fused with what surrounds them.

All statistics are float32.  A row is read once and stays in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialization import Specialization

FP8_MAX = 448.0  # the largest float8 e4m3


@triton.jit
def store_row_fp8(row, out, scale, at, columns, mask, FP8_LIMIT: tl.constexpr):
    """Quantise one row by its largest magnitude: out = row / s, s = max|row| / 448 (1 for a row of zeros)."""
    largest = tl.max(tl.where(mask, tl.abs(row), 0.0), 0)
    s = tl.where(largest > 0, largest / FP8_LIMIT, 1.0)
    scaled = tl.clamp(row / s, -FP8_LIMIT, FP8_LIMIT)
    tl.store(out + columns, scaled.to(out.dtype.element_ty), mask=mask)
    tl.store(scale + at, s)


@triton.jit
def residual_norm_kernel(
    x, y, gate, weight, bias, residual, out, scale,
    length, gate_stride, weight_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr,
    FP8: tl.constexpr, FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """residual = x + y * gate; out = LayerNorm(residual) * weight + bias, both a row."""
    at = tl.program_id(0).to(tl.int64)
    batch = at // length
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    row = tl.load(x + at * D + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_Y:
        added = tl.load(y + at * D + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + batch * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = (row + added).to(residual.dtype.element_ty)
        tl.store(residual + at * D + columns, rounded, mask=mask)
        row = rounded.to(tl.float32)  # the norm sees what the next layer will read
    mean = tl.sum(row, 0) / D
    centred = tl.where(mask, row - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    w = tl.load(weight + batch * weight_stride + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + batch * weight_stride + columns, mask=mask, other=0.0).to(tl.float32)
    normed = normed * w + b
    if FP8:
        # The same rounding as storing and then quantising.
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
        store_row_fp8(normed, out + at * D, scale, at, columns, mask, FP8_LIMIT)
    else:
        tl.store(out + at * D + columns, normed.to(out.dtype.element_ty), mask=mask)


def residual_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, fp8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `residual_norm_kernel`; arguments as `ops.residual_norm`, contiguous, weight and bias of one
    shape [1 or B, 1, D].  Returns (residual, out, scale); residual is empty without `y`, scale without `fp8`.
    """
    batch, length, width = x.shape
    residual = torch.empty_like(x) if y is not None else x.new_empty(0)
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    scale = x.new_empty((batch, length, 1) if fp8 else 0, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    residual_norm_kernel[(batch * length,)](
        x, y if y is not None else x, gate if gate is not None else weight, weight, bias,
        residual, out, scale, length,
        width if gate is not None and gate.shape[0] > 1 else 0,
        width if weight.shape[0] > 1 else 0,
        eps,
        D=width, BLOCK=block, HAS_Y=y is not None, HAS_GATE=gate is not None,
        FP8=fp8, FP8_LIMIT=FP8_MAX, num_warps=_warps(block),
    )  # fmt: skip
    return residual, out, scale


def _warps(block: int) -> int:
    """About 32 elements a thread at the widest rows, whole warps at the narrow ones."""
    return max(1, min(16, block // 1024))


HELPERS = ("store_row_fp8",)
KERNELS = tuple(
    Specialization(
        residual_norm_kernel,
        {
            **dict.fromkeys(("x", "y", "residual"), "*bf16"),
            **dict.fromkeys(("gate", "weight", "bias", "scale"), "*fp32"),
            "out": "*fp8e4nv" if fp8 else "*bf16",
            **dict.fromkeys(("length", "gate_stride", "weight_stride"), "i32"),
            "eps": "fp32",
        },
        {
            "D": 5120, "BLOCK": 8192, "HAS_Y": has_y, "HAS_GATE": has_gate, "FP8": fp8, "FP8_LIMIT": FP8_MAX,
        },
        num_warps=8,
    )
    for has_y, has_gate in ((False, False), (True, False), (True, True))
    for fp8 in (False, True)
)  # fmt: skip

"""Rows rounded to float8 e4m3, each by its largest magnitude, alone or at the end of another kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import gelu_tanh
from .launching import launch
from .specialization import Specialization

FP8_MAX = 448.0  # the largest float8 e4m3
WIDEST_BLOCK = 16384  # 32 elements a thread of 16 warps


@triton.jit
def scale_to(largest, LIMIT: tl.constexpr):
    """largest / LIMIT, but normal, so that its reciprocal is finite; 1 where all is zero."""
    return tl.where(largest > 0, tl.maximum(tl.div_rn(largest, LIMIT), 1.1754943508222875e-38), 1.0)


@triton.jit
def to_fp8(x, inverse, dtype: tl.constexpr, FP8_LIMIT: tl.constexpr):
    """x / s as e4m3, given 1 / s: a product, for a division takes several times its instructions.

    It may round past the limit, and e4m3 has no infinity; a NaN stays one.
    """
    return tl.clamp(x * inverse, -FP8_LIMIT, FP8_LIMIT, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def store_row_fp8(row, out, scale, at, columns, mask, FP8_LIMIT: tl.constexpr):
    """Quantise one row that is in registers: out = row / s and scale[at] = s = max|row| / 448."""
    s = scale_to(tl.max(tl.where(mask, tl.abs(row), 0.0), 0), FP8_LIMIT)
    tl.store(out + columns, to_fp8(row, tl.div_rn(1.0, s), out.dtype.element_ty, FP8_LIMIT), mask=mask)
    tl.store(scale + at, s)


@triton.jit
def load_part(x, columns, mask, GELU: tl.constexpr, FAST: tl.constexpr):
    """x at `columns` as float32, through the tanh form of GELU if asked; 0 outside the mask."""
    part = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        part = gelu_tanh(part, FAST)
    return part


@triton.jit
def quantize_kernel(
    x, out, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr, FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """One row of D: read once if it fits a block, else twice, the second time from L2."""
    at = tl.program_id(0).to(tl.int64)
    x += at * D
    out += at * D
    columns = tl.arange(0, BLOCK)
    if D <= BLOCK:
        mask = columns < D
        store_row_fp8(load_part(x, columns, mask, GELU, FAST), out, scale, at, columns, mask, FP8_LIMIT)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, D, BLOCK):
            part = load_part(x, start + columns, start + columns < D, GELU, FAST)
            largest = tl.maximum(largest, tl.abs(part))
        s = scale_to(tl.max(largest, 0), FP8_LIMIT)
        inverse = tl.div_rn(1.0, s)
        for start in range(0, D, BLOCK):
            mask = start + columns < D
            part = load_part(x, start + columns, mask, GELU, FAST)
            tl.store(out + start + columns, to_fp8(part, inverse, out.dtype.element_ty, FP8_LIMIT), mask=mask)
        tl.store(scale + at, s)


def quantize(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Launch `quantize_kernel` on contiguous x [..., D].  Returns (data [..., D] e4m3, scale [..., 1])."""
    width = x.shape[-1]
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block = min(WIDEST_BLOCK, triton.next_power_of_2(width))
    launch(
        quantize_kernel, (scale.numel(),),
        x, out, scale,
        D=width, BLOCK=block, GELU=gelu, FAST=x.is_cuda, FP8_LIMIT=FP8_MAX, num_warps=warps(block),
    )  # fmt: skip
    return out, scale


def warps(block: int) -> int:
    """About 32 elements a thread at the widest rows, whole warps at the narrow ones."""
    return max(1, min(16, block // 1024))


HELPERS = ("load_part", "scale_to", "store_row_fp8", "to_fp8")
KERNELS = tuple(
    Specialization(
        quantize_kernel,
        {"x": "*bf16", "out": "*fp8e4nv", "scale": "*fp32"},
        {"D": width, "BLOCK": block, "GELU": gelu, "FAST": True, "FP8_LIMIT": FP8_MAX},
        num_warps=warps(block),
    )
    for width, block in ((5120, 8192), (13824, 16384), (30720, 16384))
    for gelu in (False, True)
)

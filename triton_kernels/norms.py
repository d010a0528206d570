"""Normalisations of the DiT, a row (a token's channels) a program, fused with what surrounds them.

All statistics are float32.  A row is read once and stays in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import FP8_MAX, store_row_fp8, warps
from .specialization import Specialization


@triton.jit
def residual_norm_kernel(
    x, y, gate, weight, bias, residual, out, scale,
    length, gate_stride, weight_stride, bias_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr, FP8: tl.constexpr, FP8_LIMIT: tl.constexpr,
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
    if HAS_NORM:
        mean = tl.sum(row, 0) / D
        centred = tl.where(mask, row - mean, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        w = tl.load(weight + batch * weight_stride + columns, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(bias + batch * bias_stride + columns, mask=mask, other=0.0).to(tl.float32)
        normed = normed * w + b
        if FP8:
            # The same rounding as storing and then quantising.
            normed = normed.to(x.dtype.element_ty).to(tl.float32)
            store_row_fp8(normed, out + at * D, scale, at, columns, mask, FP8_LIMIT)
        else:
            tl.store(out + at * D + columns, normed.to(out.dtype.element_ty), mask=mask)


def residual_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `residual_norm_kernel`: x, y [B, ..., D], gate, weight and bias [1 or B, 1, D], all contiguous.

    Without weight (and bias) there is no norm.  Returns (residual, out, scale); residual is empty without
    `y`, out without `weight`, scale without `fp8`.
    """
    width, rows = x.shape[-1], math.prod(x.shape[:-1])
    residual = torch.empty_like(x) if y is not None else x.new_empty(0)
    dtype = torch.float8_e4m3fn if fp8 else x.dtype
    out = torch.empty_like(x, dtype=dtype) if weight is not None else x.new_empty(0, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1) if fp8 else 0, dtype=torch.float32)
    block = triton.next_power_of_2(width)

    def stride(parameter: Tensor | None) -> int:
        return width if parameter is not None and parameter.shape[0] > 1 else 0

    residual_norm_kernel[(rows,)](
        # x stands in for what is not there: never read.
        *(x if part is None else part for part in (x, y, gate, weight, bias)),
        residual, out, scale, math.prod(x.shape[1:-1]), stride(gate), stride(weight), stride(bias), eps,
        D=width, BLOCK=block, HAS_Y=y is not None, HAS_GATE=gate is not None, HAS_NORM=weight is not None,
        FP8=fp8, FP8_LIMIT=FP8_MAX, num_warps=warps(block),
    )  # fmt: skip
    return residual, out, scale


@triton.jit
def qk_norm_rope_kernel(
    x, weight, table, out,
    length, batch_stride, row_stride, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """out = RMSNorm(row) * weight over all H*D channels, then each head's pairs turned by the row's angles.

    As [heads, channels] the D values of the table's row are loaded once for the heads that share a thread.
    """
    at = tl.program_id(0).to(tl.int64)
    batch, position = at // length, at % length
    head, channel = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (head < H) & (channel < D)
    columns = head * D + channel
    start = batch * batch_stride + position * row_stride
    row = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
    mean_square = tl.sum(tl.sum(row * row, 1), 0) / (H * D)
    row *= tl.rsqrt(mean_square + eps)
    row *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if ROTATE:
        turn = tl.load(table + position * D + channel, mask=channel < D, other=0.0)
        cos, sin = tl.split(tl.reshape(turn, (1, BLOCK_D // 2, 2)))
        real, imag = tl.split(tl.reshape(row, (BLOCK_H, BLOCK_D // 2, 2)))
        turned = tl.join(real * cos - imag * sin, real * sin + imag * cos)
        row = tl.reshape(turned, (BLOCK_H, BLOCK_D))
    tl.store(out + at * (H * D) + columns, row.to(out.dtype.element_ty), mask=mask)


def qk_norm_rope(x: Tensor, weight: Tensor, table: Tensor | None, num_heads: int, eps: float) -> Tensor:
    """Launch `qk_norm_rope_kernel`: x [B, L, H*D] of any strides but contiguous channels, weight [H*D] and
    table [L, D/2, 2] contiguous -> [B, L, H, D] contiguous."""
    batch, length, width = x.shape
    head_dim = width // num_heads
    out = x.new_empty(batch, length, num_heads, head_dim)
    heads, channels = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim)
    qk_norm_rope_kernel[(batch * length,)](
        x, weight, weight if table is None else table, out, length, x.stride(0), x.stride(1), eps,
        H=num_heads, D=head_dim, BLOCK_H=heads, BLOCK_D=channels, ROTATE=table is not None,
        num_warps=warps(heads * channels),
    )  # fmt: skip
    return out


_RESIDUAL_NORM_FORMS = (  # y, gate, norm
    (False, False, True),
    (True, False, True),
    (True, True, True),
    (True, True, False),
)
KERNELS = (
    *(
        Specialization(
            residual_norm_kernel,
            {
                **dict.fromkeys(("x", "y", "residual"), "*bf16"),
                **dict.fromkeys(("gate", "weight", "bias", "scale"), "*fp32"),
                "out": "*fp8e4nv" if fp8 else "*bf16",
                **dict.fromkeys(("length", "gate_stride", "weight_stride", "bias_stride"), "i32"),
                "eps": "fp32",
            },
            {
                "D": 5120, "BLOCK": 8192, "HAS_Y": has_y, "HAS_GATE": has_gate, "HAS_NORM": has_norm,
                "FP8": fp8, "FP8_LIMIT": FP8_MAX,
            },
            num_warps=8,
        )
        for has_y, has_gate, has_norm in _RESIDUAL_NORM_FORMS
        for fp8 in ((False, True) if has_norm else (False,))
    ),
    *(
        Specialization(
            qk_norm_rope_kernel,
            {
                **dict.fromkeys(("x", "weight", "out"), "*bf16"),
                "table": "*fp32",
                **dict.fromkeys(("length", "batch_stride", "row_stride"), "i32"),
                "eps": "fp32",
            },
            {"H": 40, "D": 128, "BLOCK_H": 64, "BLOCK_D": 128, "ROTATE": rotate},
            num_warps=8,
        )
        for rotate in (False, True)
    ),
)  # fmt: skip

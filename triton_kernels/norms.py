"""Normalisations of the DiT, a row (a token's channels) at a time, fused with what surrounds them.

All statistics are float32.  A row is read once and stays in registers, as parts of a power of two of
channels: no lane idles at a width of five such parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .quantize import FP8_MAX, scale_to, to_fp8
from .specialization import Specialization, multiprocessors

VECTOR = 4  # channels a thread loads at once: 16 bytes of float32 parameters
WARPS = 8  # of a program of `residual_norm_kernel`, at most
# Of all its programs, on a multiprocessor: with a residual, the fastest of 8 to 64 on an H100.
RESIDENT_WARPS = 64
HEAD_PART = 8  # heads of a part of `qk_norm_rope_kernel`, at most
HEADS_WARPS = 4


@triton.jit
def channels(part, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """[1, BLOCK] of a row: part `part`'s.

    The hint keeps every tensor of a part in one layout, VECTOR a thread.  Left to itself the compiler gives
    each as many as fill 16 bytes, and what it loads is exchanged through shared memory.
    """
    first = tl.max_contiguous(tl.arange(0, BLOCK)[None, :], [1, VECTOR])
    return tl.max_contiguous(part * BLOCK + first, [1, VECTOR])


@triton.jit
def load_row(at, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The D channels that `at` points at, as PARTS tensors [1, BLOCK] in their dtype; 0 past D."""
    parts = ()
    for i in tl.static_range(PARTS):
        columns = channels(i, BLOCK, VECTOR)
        if (i + 1) * BLOCK > D:
            parts += (tl.load(at + columns, mask=columns < D, other=0.0),)  # type: ignore[assignment]
        else:
            parts += (tl.load(at + columns),)  # type: ignore[assignment]
    return parts


@triton.jit
def store_channels(at, columns, value, D: tl.constexpr, MASKED: tl.constexpr):
    """Store the channels `columns` of what `at` points at, in its dtype; nothing past D."""
    if MASKED:
        tl.store(at + columns, value.to(at.dtype.element_ty), mask=columns < D)
    else:
        tl.store(at + columns, value.to(at.dtype.element_ty))


@triton.jit
def round_to(x, dtype: tl.constexpr, FAST: tl.constexpr):
    """float32 x rounded to `dtype`, as float32.

    FAST, on a GPU: bfloat16 by pairs, one instruction for two; the compiler rounds one at a time what it
    also reads back.  Triton's interpreter has no inline assembly.
    """
    if FAST and dtype == tl.bfloat16:
        rounded = tl.inline_asm_elementwise(
            """{
            .reg .b32 pair;
            cvt.rn.bf16x2.f32 pair, $3, $2;
            shl.b32 $0, pair, 16;
            and.b32 $1, pair, 0xffff0000;
            }""",
            "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded


@triton.jit
def residual_norm_kernel(
    x, y, gate, weight, bias, residual, out, scale,
    length, gate_stride, weight_stride, bias_stride, eps,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr,
    FP8: tl.constexpr, FP8_LIMIT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """residual = x + y * gate; out = LayerNorm(residual) * weight + bias, for a program's share of the
    `length` rows of a batch element: every `num_programs`-th.

    The parameters, 60 KB of float32 at a width of 5120, are read once and stay in registers.  A row arrives
    while the one before it is computed.
    """
    batch = tl.program_id(1).to(tl.int64)
    gates = ()
    weights = ()
    biases = ()
    if HAS_GATE:
        gates = load_row(gate + batch * gate_stride, D, PARTS, BLOCK, VECTOR)
    if HAS_NORM:
        weights = load_row(weight + batch * weight_stride, D, PARTS, BLOCK, VECTOR)
        biases = load_row(bias + batch * bias_stride, D, PARTS, BLOCK, VECTOR)
    first = batch * length
    next_y = ()
    next_x = load_row(x + (first + tl.program_id(0)) * D, D, PARTS, BLOCK, VECTOR)
    if HAS_Y:
        next_y = load_row(y + (first + tl.program_id(0)) * D, D, PARTS, BLOCK, VECTOR)
    for row in tl.range(tl.program_id(0), length, tl.num_programs(0), num_stages=1):
        at = (first + row) * D
        x_row = next_x
        y_row = next_y
        # The last of a program reads a row that it has no use for.
        after = (first + tl.minimum(row + tl.num_programs(0), length - 1)) * D
        next_x = load_row(x + after, D, PARTS, BLOCK, VECTOR)
        if HAS_Y:
            next_y = load_row(y + after, D, PARTS, BLOCK, VECTOR)
        parts = ()
        total = tl.zeros((1, BLOCK), tl.float32)
        for i in tl.static_range(PARTS):
            part = x_row[i].to(tl.float32)
            if HAS_Y:
                added = y_row[i].to(tl.float32)  # type: ignore[var-annotated]
                if HAS_GATE:
                    added *= gates[i].to(tl.float32)
                # The norm sees what the next layer will read.
                part = round_to(part + added, residual.dtype.element_ty, FAST)
                store_channels(residual + at, channels(i, BLOCK, VECTOR), part, D, (i + 1) * BLOCK > D)
            total += part
            parts += (part,)  # type: ignore[assignment]
        if HAS_NORM:
            mean = tl.sum(total, 1)[:, None] / D
            squares = tl.zeros((1, BLOCK), tl.float32)
            for i in tl.static_range(PARTS):
                centred = parts[i] - mean
                if (i + 1) * BLOCK > D:
                    centred = tl.where(channels(i, BLOCK, VECTOR) < D, centred, 0.0)
                squares += centred * centred
            spread = tl.rsqrt(tl.sum(squares, 1)[:, None] / D + eps)
            normed_parts = ()
            largest = tl.zeros((1, BLOCK), tl.float32)
            for i in tl.static_range(PARTS):
                # Past D, where weight and bias are 0, it is 0.
                normed = (parts[i] - mean) * spread * weights[i].to(tl.float32) + biases[i].to(tl.float32)
                if FP8:
                    # The same rounding as storing and then quantising.
                    normed = round_to(normed, x.dtype.element_ty, FAST)
                    normed_parts += (normed,)
                    largest = tl.maximum(largest, tl.abs(normed))
                else:
                    store_channels(out + at, channels(i, BLOCK, VECTOR), normed, D, (i + 1) * BLOCK > D)
            if FP8:
                s = scale_to(tl.max(largest, 1)[:, None], FP8_LIMIT)
                inverse = tl.div_rn(1.0, s)
                for i in tl.static_range(PARTS):
                    rounded = to_fp8(normed_parts[i], inverse, out.dtype.element_ty, FP8_LIMIT)
                    store_channels(out + at, channels(i, BLOCK, VECTOR), rounded, D, (i + 1) * BLOCK > D)
                tl.store(scale + first + row + tl.zeros((1, 1), tl.int32), s)


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
    strides = [width if v is not None and v.shape[0] > 1 else 0 for v in (gate, weight, bias)]
    length = math.prod(x.shape[1:-1]) if any(strides) else rows  # else all rows have the same parameters
    warps = min(WARPS, max(1, triton.next_power_of_2(width) // (VECTOR * 32)))
    block = VECTOR * 32 * warps
    programs = min(length, multiprocessors(x.device) * (RESIDENT_WARPS // warps))
    launch(
        residual_norm_kernel, (programs, rows // length),
        # x stands in for what is not there: never read.
        *(x if part is None else part for part in (x, y, gate, weight, bias)),
        residual, out, scale, length, *strides, eps,
        D=width, PARTS=triton.cdiv(width, block), BLOCK=block, VECTOR=VECTOR,
        HAS_Y=y is not None, HAS_GATE=gate is not None, HAS_NORM=weight is not None,
        FP8=fp8, FP8_LIMIT=FP8_MAX, FAST=x.is_cuda, num_warps=warps,
    )  # fmt: skip
    return residual, out, scale


@triton.jit
def load_heads(at, columns, channel, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`columns` of what `at` points at, as float32; 0 past a head's D channels."""
    loaded = tl.load(at + columns, mask=channel < D, other=0.0) if D < BLOCK_D else tl.load(at + columns)
    return loaded.to(tl.float32)


@triton.jit
def qk_norm_rope_kernel(
    x, weight, table, out,
    length, batch_stride, row_stride, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """out = RMSNorm(row) * weight over all H*D channels, then each head's pairs turned by the row's angles.

    The row is parts of BLOCK_H heads, which divide H; the D values of the table's row serve every part.
    """
    at = tl.program_id(0).to(tl.int64)
    batch, position = at // length, at % length
    channel = tl.arange(0, BLOCK_D)[None, :]
    columns = tl.arange(0, BLOCK_H)[:, None] * D + channel
    x += batch * batch_stride + position * row_stride
    parts = ()
    squares = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for first in tl.static_range(0, H, BLOCK_H):
        part = load_heads(x + first * D, columns, channel, D, BLOCK_D)
        squares += part * part
        parts += (part,)  # type: ignore[assignment]
    spread = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / (H * D) + eps)
    if ROTATE:
        # For every head, so that each thread loads what it turns by, in the layout of what it turns.
        angles = tl.broadcast_to(channel, (BLOCK_H, BLOCK_D))
        turn = load_heads(table + position * D, angles, channel, D, BLOCK_D)
        cos, sin = tl.split(tl.reshape(turn, (BLOCK_H, BLOCK_D // 2, 2)))
    for i in tl.static_range(H // BLOCK_H):
        part = parts[i] * spread * load_heads(weight + i * BLOCK_H * D, columns, channel, D, BLOCK_D)
        if ROTATE:
            real, imag = tl.split(tl.reshape(part, (BLOCK_H, BLOCK_D // 2, 2)))
            turned = tl.join(real * cos - imag * sin, real * sin + imag * cos)
            part = tl.reshape(turned, (BLOCK_H, BLOCK_D))
        to = out + at * (H * D) + i * BLOCK_H * D + columns
        if D < BLOCK_D:
            tl.store(to, part.to(out.dtype.element_ty), mask=channel < D)
        else:
            tl.store(to, part.to(out.dtype.element_ty))


def qk_norm_rope(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    num_heads: int,
    eps: float,
    warps: int = HEADS_WARPS,
    part: int = HEAD_PART,
) -> Tensor:
    """Launch `qk_norm_rope_kernel`: x [B, L, H*D] of any strides but contiguous channels, weight [H*D] and
    table [L, D/2, 2] contiguous -> [B, L, H, D] contiguous.  `part`: a power of two."""
    batch, length, width = x.shape
    head_dim = width // num_heads
    out = x.new_empty(batch, length, num_heads, head_dim)
    heads, block = math.gcd(num_heads, part), triton.next_power_of_2(head_dim)
    launch(
        qk_norm_rope_kernel, (batch * length,),
        x, weight, weight if table is None else table, out, length, x.stride(0), x.stride(1), eps,
        H=num_heads, D=head_dim, BLOCK_H=heads, BLOCK_D=block, ROTATE=table is not None,
        num_warps=min(warps, max(1, heads * block // 128)),
    )  # fmt: skip
    return out


HELPERS = ("channels", "load_heads", "load_row", "round_to", "store_channels")
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
                "D": 5120, "PARTS": 5120 // (VECTOR * 32 * WARPS), "BLOCK": VECTOR * 32 * WARPS,
                "VECTOR": VECTOR, "HAS_Y": has_y, "HAS_GATE": has_gate,
                "HAS_NORM": has_norm, "FP8": fp8, "FP8_LIMIT": FP8_MAX, "FAST": True,
            },
            num_warps=WARPS,
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
            {"H": 40, "D": 128, "BLOCK_H": HEAD_PART, "BLOCK_D": 128, "ROTATE": rotate},
            num_warps=HEADS_WARPS,
        )
        for rotate in (False, True)
    ),
)  # fmt: skip

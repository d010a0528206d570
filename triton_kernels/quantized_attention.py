"""Queries and keys rounded to int8, values to e4m3, as eight-bit attention multiplies them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .quantize import FP8_MAX, row_scale, to_fp8
from .specialization import Specialization

INT8_MAX = 127.0
GROUP_KEYS = 32  # keys whose order among the values is that of a product's operand
# Of a block; on an H200, at twice the keys a scale, half or twice the rows or warps took 2 to 15% longer.
SCORE_ROWS, SCORE_WARPS = 32, 4
VALUE_ROWS, VALUE_WARPS = 64, 4


@triton.jit
def int8_scale(largest, INT8_LIMIT: tl.constexpr):
    """largest / 127, but normal; 1 where all is zero."""
    return tl.where(largest > 0, tl.maximum(tl.div_rn(largest, INT8_LIMIT), 1.1754943508222875e-38), 1.0)


@triton.jit
def to_int8(x, inverse, INT8_LIMIT: tl.constexpr):
    """x / s to the nearest, halves upward, given 1 / s."""
    return tl.floor(tl.clamp(x * inverse, -INT8_LIMIT, INT8_LIMIT) + 0.5).to(tl.int8)


@triton.jit
def scores_kernel(
    q, k, v, q_out, k_out, q_scale, k_scale, v_largest,
    length, keys, heads, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, INT8_LIMIT: tl.constexpr,
):  # fmt: skip
    """TILE rows of one head: queries by row, keys together, and the largest magnitude among the values.

    A tile of keys is read twice, the second time from L2.
    """
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, D)[None, :]
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    both = batch * heads + head
    k_most = 0.0
    v_most = 0.0
    for start in tl.static_range(0, TILE, ROWS):
        rows = (tile * TILE + start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < keys)[:, None]
        k_part = tl.load(k + rows[:, None] * k_row + columns, mask=mask, other=0.0).to(tl.float32)
        v_part = tl.load(v + rows[:, None] * v_row + columns, mask=mask, other=0.0).to(tl.float32)
        k_most = tl.maximum(k_most, tl.max(tl.abs(k_part)))
        v_most = tl.maximum(v_most, tl.max(tl.abs(v_part)))
        some = rows < length
        q_part = tl.load(q + rows[:, None] * q_row + columns, mask=some[:, None], other=0.0).to(tl.float32)
        scale = int8_scale(tl.max(tl.abs(q_part), 1), INT8_LIMIT)
        data = to_int8(q_part, tl.div_rn(1.0, scale)[:, None], INT8_LIMIT)
        tl.store(
            q_out + ((batch * length + rows) * heads + head)[:, None] * D + columns, data, mask=some[:, None]
        )
        tl.store(q_scale + both * length + rows, scale, mask=some)
    tiles = tl.cdiv(keys, TILE)
    if tile < tiles:
        tile_scale = int8_scale(k_most, INT8_LIMIT)
        tl.store(k_scale + both * tiles + tile, tile_scale)
        tl.store(v_largest + both * tiles + tile, v_most)
        inverse = tl.div_rn(1.0, tile_scale)
        for start in tl.static_range(0, TILE, ROWS):
            rows = (tile * TILE + start + tl.arange(0, ROWS)).to(tl.int64)
            mask = (rows < keys)[:, None]
            part = tl.load(k + rows[:, None] * k_row + columns, mask=mask, other=0.0).to(tl.float32)
            to = k_out + ((batch * keys + rows) * heads + head)[:, None] * D + columns
            tl.store(to, to_int8(part, inverse, INT8_LIMIT), mask=mask)


@triton.jit
def values_kernel(
    v, v_largest, out, v_scale, keys, padded, heads, tiles, v_batch, v_row, v_head,
    D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """out [.., D, padded]: ROWS values of one head, transposed, their keys in the operand's order."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    both = batch * heads + head
    at = tl.arange(0, TILES)
    scale = row_scale(tl.max(tl.load(v_largest + both * tiles + at, mask=at < tiles, other=0.0)), FP8_LIMIT)
    if block == 0:
        tl.store(v_scale + both, scale)
    positions = block * ROWS + tl.arange(0, ROWS)
    # position_key in csrc/include/quantized_attention.h
    p = positions % 16
    rows = (positions // 16 * 16 + p % 4 // 2 * 8 + p // 4 * 2 + p % 2).to(tl.int64)
    columns = tl.arange(0, D)
    x = tl.load(
        v + batch * v_batch + head * v_head + rows[:, None] * v_row + columns[None, :],
        mask=(rows < keys)[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    data = tl.trans(to_fp8(x, tl.div_rn(1.0, scale), out.dtype.element_ty, FP8_LIMIT))
    to = out + (both * D + columns)[:, None] * padded + positions[None, :]
    tl.store(to, data, mask=(positions < padded)[None, :])


def quantize(q: Tensor, k: Tensor, v: Tensor, tile_keys: int) -> tuple[Tensor, ...]:
    """q [B, L, H, D]; k, v [B, M, H, D], D a power of two and contiguous -> the data and the scales of each:
    int8 [B, L, H, D], [B, H, L]; int8 [B, M, H, D], [B, H, M / tile_keys rounded up]; e4m3 [B, H, D, M padded
    to 32 with zeros], [B, H].  tile_keys: keys that share a scale, a multiple of 32."""
    batch, length, heads, dim = q.shape
    keys = k.shape[1]
    tiles = triton.cdiv(keys, tile_keys)
    padded = triton.cdiv(keys, GROUP_KEYS) * GROUP_KEYS
    q_out, k_out = (x.new_empty(x.shape, dtype=torch.int8) for x in (q, k))
    q_scale = q.new_empty((batch, heads, length), dtype=torch.float32)
    k_scale, v_largest = (q.new_empty((batch, heads, tiles), dtype=torch.float32) for _ in range(2))
    v_scale = q.new_empty((batch, heads), dtype=torch.float32)
    v_out = q.new_empty((batch, heads, dim, padded), dtype=torch.float8_e4m3fn)
    strides = [x.stride(i) for x in (q, k, v) for i in range(3)]
    launch(
        scores_kernel, (triton.cdiv(max(length, keys), tile_keys), heads, batch),
        q, k, v, q_out, k_out, q_scale, k_scale, v_largest, length, keys, heads, *strides,
        D=dim, ROWS=SCORE_ROWS, TILE=tile_keys, INT8_LIMIT=INT8_MAX, num_warps=SCORE_WARPS,
    )  # fmt: skip
    launch(
        values_kernel, (triton.cdiv(padded, VALUE_ROWS), heads, batch),
        v, v_largest, v_out, v_scale, keys, padded, heads, tiles, *strides[6:],
        D=dim, ROWS=VALUE_ROWS, TILES=triton.next_power_of_2(tiles), FP8_LIMIT=FP8_MAX, num_warps=VALUE_WARPS,
    )  # fmt: skip
    return q_out, q_scale, k_out, k_scale, v_out, v_scale


HELPERS = ("int8_scale", "to_int8")
KERNELS = (
    Specialization(
        scores_kernel,
        {
            **dict.fromkeys(("q", "k", "v"), "*bf16"),
            **dict.fromkeys(("q_out", "k_out"), "*i8"),
            **dict.fromkeys(("q_scale", "k_scale", "v_largest"), "*fp32"),
            **dict.fromkeys(("length", "keys", "heads"), "i32"),
            **{f"{x}_{step}": "i32" for x in "qkv" for step in ("batch", "row", "head")},
        },
        {"D": 128, "ROWS": SCORE_ROWS, "TILE": 96, "INT8_LIMIT": INT8_MAX},
        num_warps=SCORE_WARPS,
    ),
    Specialization(
        values_kernel,
        {
            **{"v": "*bf16", "v_largest": "*fp32", "out": "*fp8e4nv", "v_scale": "*fp32"},
            **dict.fromkeys(("keys", "padded", "heads", "tiles", "v_batch", "v_row", "v_head"), "i32"),
        },
        {"D": 128, "ROWS": VALUE_ROWS, "TILES": 128, "FP8_LIMIT": FP8_MAX},
        num_warps=VALUE_WARPS,
    ),
)

"""Queries and keys rounded to int8, values to e4m3, as eight-bit attention multiplies them.

Off the keys is taken their mean, which adds the same to all scores of a query, and off the values theirs,
which comes back at the end: what all of a channel share would take most of what eight bits can tell apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .quantize import FP8_MAX, scale_to, to_fp8
from .specialization import Specialization

INT8_MAX = 127.0
GROUP_KEYS = 32  # keys whose order among the values is that of a product's operand
# Of a block.  All four take 0.36 ms of an H200 at the published size.  profiles/results/h200-2026-11-29.json
# has another form, of 0.21.
SCORE_ROWS, SCORE_WARPS = 32, 4
VALUE_ROWS, VALUE_WARPS = 64, 4
PARTS = 32  # of a block of `means_kernel`


@triton.jit
def to_int8(x, inverse, INT8_LIMIT: tl.constexpr):
    """x / s to the nearest, halves upward, given 1 / s."""
    return tl.floor(tl.clamp(x * inverse, -INT8_LIMIT, INT8_LIMIT) + 0.5).to(tl.int8)


@triton.jit
def parts_kernel(
    k, v, k_sum, v_sum, v_largest, keys, heads, k_batch, k_row, k_head, v_batch, v_row, v_head,
    D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of TILE rows of one head: the sums of keys and of values, and the largest magnitude of a value."""
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, D)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    k_total = tl.zeros((D,), tl.float32)
    v_total = tl.zeros((D,), tl.float32)
    v_most = 0.0
    for start in tl.static_range(0, TILE, ROWS):
        rows = (tile * TILE + start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < keys)[:, None]
        k_part = tl.load(k + rows[:, None] * k_row + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        v_part = tl.load(v + rows[:, None] * v_row + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        k_total += tl.sum(k_part, 0)
        v_total += tl.sum(v_part, 0)
        v_most = tl.maximum(v_most, tl.max(tl.abs(v_part)))
    at = (batch * heads + head) * tl.num_programs(0) + tile
    tl.store(k_sum + at * D + columns, k_total)
    tl.store(v_sum + at * D + columns, v_total)
    tl.store(v_largest + at, v_most)


@triton.jit
def means_kernel(
    k_sum, v_sum, v_largest, k_mean, v_mean, v_scale, keys, tiles,
    D: tl.constexpr, PARTS: tl.constexpr, FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """Of one head: the means, and the values' scale, by a bound on what is left of them."""
    at = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    k_total = tl.zeros((D,), tl.float32)
    v_total = tl.zeros((D,), tl.float32)
    v_most = 0.0
    for start in range(0, tiles, PARTS):
        part = start + tl.arange(0, PARTS)
        where = (at * tiles + part)[:, None] * D + columns[None, :]
        mask = (part < tiles)[:, None]
        k_total += tl.sum(tl.load(k_sum + where, mask=mask, other=0.0), 0)
        v_total += tl.sum(tl.load(v_sum + where, mask=mask, other=0.0), 0)
        v_most = tl.maximum(
            v_most, tl.max(tl.load(v_largest + at * tiles + part, mask=part < tiles, other=0.0))
        )
    mean = v_total / keys
    tl.store(k_mean + at * D + columns, k_total / keys)
    tl.store(v_mean + at * D + columns, mean)
    tl.store(v_scale + at, scale_to(v_most + tl.max(tl.abs(mean)), FP8_LIMIT))


@triton.jit
def scores_kernel(
    q, k, k_mean, q_out, k_out, q_scale, k_scale,
    length, keys, heads, q_batch, q_row, q_head, k_batch, k_row, k_head,
    D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, INT8_LIMIT: tl.constexpr,
):  # fmt: skip
    """TILE rows of one head: queries by row, keys together.  Keys are read twice, the second time from L2."""
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, D)[None, :]
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    both = batch * heads + head
    mean = tl.load(k_mean + both * D + columns)
    k_most = 0.0
    for start in tl.static_range(0, TILE, ROWS):
        rows = (tile * TILE + start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < keys)[:, None]
        k_part = tl.load(k + rows[:, None] * k_row + columns, mask=mask, other=0.0).to(tl.float32)
        k_most = tl.maximum(k_most, tl.max(tl.abs(tl.where(mask, k_part - mean, 0.0))))
        some = rows < length
        q_part = tl.load(q + rows[:, None] * q_row + columns, mask=some[:, None], other=0.0).to(tl.float32)
        scale = scale_to(tl.max(tl.abs(q_part), 1), INT8_LIMIT)
        data = to_int8(q_part, tl.div_rn(1.0, scale)[:, None], INT8_LIMIT)
        to = q_out + ((batch * length + rows) * heads + head)[:, None] * D + columns
        tl.store(to, data, mask=some[:, None])
        tl.store(q_scale + both * length + rows, scale, mask=some)
    tiles = tl.cdiv(keys, TILE)
    if tile < tiles:
        tile_scale = scale_to(k_most, INT8_LIMIT)
        tl.store(k_scale + both * tiles + tile, tile_scale)
        inverse = tl.div_rn(1.0, tile_scale)
        for start in tl.static_range(0, TILE, ROWS):
            rows = (tile * TILE + start + tl.arange(0, ROWS)).to(tl.int64)
            mask = (rows < keys)[:, None]
            part = tl.load(k + rows[:, None] * k_row + columns, mask=mask, other=0.0).to(tl.float32)
            to = k_out + ((batch * keys + rows) * heads + head)[:, None] * D + columns
            tl.store(to, to_int8(part - mean, inverse, INT8_LIMIT), mask=mask)


@triton.jit
def values_kernel(
    v, v_mean, v_scale, out, keys, padded, heads, v_batch, v_row, v_head,
    D: tl.constexpr, ROWS: tl.constexpr, FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """out [.., D, padded]: ROWS values of one head, transposed, their keys in the operand's order."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    both = batch * heads + head
    positions = block * ROWS + tl.arange(0, ROWS)
    # position_key in csrc/include/quantized_attention.h
    p = positions % 16
    rows = (positions // 16 * 16 + p % 4 // 2 * 8 + p // 4 * 2 + p % 2).to(tl.int64)
    columns = tl.arange(0, D)
    mask = (rows < keys)[:, None]
    x = tl.load(
        v + batch * v_batch + head * v_head + rows[:, None] * v_row + columns[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    x = tl.where(mask, x - tl.load(v_mean + both * D + columns)[None, :], 0.0)
    inverse = tl.div_rn(1.0, tl.load(v_scale + both))
    data = tl.trans(to_fp8(x, inverse, out.dtype.element_ty, FP8_LIMIT))
    to = out + (both * D + columns)[:, None] * padded + positions[None, :]
    tl.store(to, data, mask=(positions < padded)[None, :])


def quantize(q: Tensor, k: Tensor, v: Tensor, tile_keys: int) -> tuple[Tensor, ...]:
    """q [B, L, H, D]; k, v [B, M, H, D], D a power of two and contiguous -> the data and the scales of each:
    int8 [B, L, H, D], [B, H, L]; int8 [B, M, H, D], [B, H, M / tile_keys rounded up]; e4m3 [B, H, D, M padded
    to 32 with zeros], [B, H]; and what was taken off the values, [B, H, D].  tile_keys: keys that share a
    scale, a multiple of 32."""
    batch, length, heads, dim = q.shape
    keys = k.shape[1]
    tiles = triton.cdiv(keys, tile_keys)
    padded = triton.cdiv(keys, GROUP_KEYS) * GROUP_KEYS

    def floats(*shape: int) -> Tensor:
        return q.new_empty((batch, heads, *shape), dtype=torch.float32)

    k_sum, v_sum, v_largest = floats(tiles, dim), floats(tiles, dim), floats(tiles)
    k_mean, v_mean, v_scale = floats(dim), floats(dim), floats()
    q_scale, k_scale = floats(length), floats(tiles)
    q_out, k_out = (x.new_empty(x.shape, dtype=torch.int8) for x in (q, k))
    v_out = q.new_empty((batch, heads, dim, padded), dtype=torch.float8_e4m3fn)
    q_strides, k_strides, v_strides = (x.stride()[:3] for x in (q, k, v))
    launch(
        parts_kernel, (tiles, heads, batch),
        k, v, k_sum, v_sum, v_largest, keys, heads, *k_strides, *v_strides,
        D=dim, ROWS=SCORE_ROWS, TILE=tile_keys, num_warps=SCORE_WARPS,
    )  # fmt: skip
    launch(
        means_kernel, (batch * heads,),
        k_sum, v_sum, v_largest, k_mean, v_mean, v_scale, keys, tiles,
        D=dim, PARTS=PARTS, FP8_LIMIT=FP8_MAX, num_warps=SCORE_WARPS,
    )  # fmt: skip
    launch(
        scores_kernel, (triton.cdiv(max(length, keys), tile_keys), heads, batch),
        q, k, k_mean, q_out, k_out, q_scale, k_scale, length, keys, heads, *q_strides, *k_strides,
        D=dim, ROWS=SCORE_ROWS, TILE=tile_keys, INT8_LIMIT=INT8_MAX, num_warps=SCORE_WARPS,
    )  # fmt: skip
    launch(
        values_kernel, (triton.cdiv(padded, VALUE_ROWS), heads, batch),
        v, v_mean, v_scale, v_out, keys, padded, heads, *v_strides,
        D=dim, ROWS=VALUE_ROWS, FP8_LIMIT=FP8_MAX, num_warps=VALUE_WARPS,
    )  # fmt: skip
    return q_out, q_scale, k_out, k_scale, v_out, v_scale, v_mean


HELPERS = ("to_int8",)
STRIDES = {x: {f"{x}_{step}": "i32" for step in ("batch", "row", "head")} for x in "qkv"}
KERNELS = (
    Specialization(
        parts_kernel,
        {
            **dict.fromkeys(("k", "v"), "*bf16"),
            **dict.fromkeys(("k_sum", "v_sum", "v_largest"), "*fp32"),
            **dict.fromkeys(("keys", "heads"), "i32"),
            **STRIDES["k"],
            **STRIDES["v"],
        },
        {"D": 128, "ROWS": SCORE_ROWS, "TILE": 96},
        num_warps=SCORE_WARPS,
    ),
    Specialization(
        means_kernel,
        {
            **dict.fromkeys(("k_sum", "v_sum", "v_largest", "k_mean", "v_mean", "v_scale"), "*fp32"),
            **dict.fromkeys(("keys", "tiles"), "i32"),
        },
        {"D": 128, "PARTS": PARTS, "FP8_LIMIT": FP8_MAX},
        num_warps=SCORE_WARPS,
    ),
    Specialization(
        scores_kernel,
        {
            **dict.fromkeys(("q", "k"), "*bf16"),
            **dict.fromkeys(("q_out", "k_out"), "*i8"),
            **dict.fromkeys(("k_mean", "q_scale", "k_scale"), "*fp32"),
            **dict.fromkeys(("length", "keys", "heads"), "i32"),
            **STRIDES["q"],
            **STRIDES["k"],
        },
        {"D": 128, "ROWS": SCORE_ROWS, "TILE": 96, "INT8_LIMIT": INT8_MAX},
        num_warps=SCORE_WARPS,
    ),
    Specialization(
        values_kernel,
        {
            **{"v": "*bf16", "v_mean": "*fp32", "v_scale": "*fp32", "out": "*fp8e4nv"},
            **dict.fromkeys(("keys", "padded", "heads"), "i32"),
            **STRIDES["v"],
        },
        {"D": 128, "ROWS": VALUE_ROWS, "FP8_LIMIT": FP8_MAX},
        num_warps=VALUE_WARPS,
    ),
)

"""Attention over chunks, forward: FlashAttention's online softmax over tiles of keys.

A tile of queries never spans two chunks, so what it sees is one prefix of the keys: no tile outside the
mask is visited, and only the ragged last tile of the prefix is masked.  Scores are kept as q . k; the
softmax scale and the change to base 2 are one factor inside exp2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .specialization import Specialization

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e)
LN2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """How many queries and keys a program holds at once, and how the compiler runs it."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By head dimension (padded to a power of two) and bytes an element; beside each the shared memory it takes
# when Triton 3.6 compiles it for sm_90, of the 227 KB that a block may have.  None of them spills registers,
# which is how they were taken.  At (128, 2), on one H100 with 12,096 tokens of 40 heads: 519 TFLOP/s; of ten
# other tiles one, (128, 64, 8, 4), did 522, the others 150 to 493.
FORWARD = {
    (16, 2): Tile(128, 64, 8, 3),  # 16 KB
    (32, 2): Tile(128, 64, 8, 3),  # 32 KB
    (64, 2): Tile(128, 128, 8, 3),  # 112 KB
    (128, 2): Tile(128, 64, 8, 3),  # 128 KB
    # float32 products without tensor cores: their operands are what fills the registers.
    (16, 4): Tile(64, 32, 4, 2),  # 16 KB
    (32, 4): Tile(32, 32, 4, 2),  # 16 KB
    (64, 4): Tile(32, 32, 8, 2),  # 28 KB
    (128, 4): Tile(32, 32, 8, 1),  # 36 KB
}


@triton.jit
def load_tile(base, row_stride, rows, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK_D] from `base`: zeros past D, and past `rows` where MASKED."""
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    at = base + r * row_stride + c
    if MASKED:
        tile = tl.load(at, mask=(r < rows) & (c < D), other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(at, mask=c < D, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def attend(
    out, total, top, q, k, v, bias, k_row, v_row, first, last,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Let a tile of queries see keys first..last; `k`, `v` and `bias` point at key `first`.

    `out`: the values so far, weighted by 2^(SCALE * score - top); `total`: those weights' sum; `top`: the
    largest SCALE * score.
    """
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    columns = tl.arange(0, BLOCK_N)
    for start in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED else None):
        keys = load_tile(k, k_row, last - start, BLOCK_N, D, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if HAS_BIAS:
            scores += tl.load(bias + columns, mask=columns < last - start, other=0.0)[None, :] * D**0.5
        if MASKED:
            scores = tl.where((columns < last - start)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * SCALE)
        # A bias of -inf hides a key, maybe a whole tile: -inf - -inf is no number.
        shift = tl.where(higher == float("-inf"), 0.0, higher) if HAS_BIAS else higher
        weights = tl.math.exp2(scores * SCALE - shift[:, None])
        fade = tl.math.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        values = load_tile(v, v_row, last - start, BLOCK_N, D, BLOCK_D, MASKED)
        out = tl.dot(weights.to(values.dtype), values, out * fade[:, None], input_precision="ieee")
        top = higher
        k += BLOCK_N * k_row
        v += BLOCK_N * v_row
        bias += BLOCK_N
    return out, total, top


@triton.jit
def forward_kernel(
    q, k, v, key_length, bias, out, lse,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, bias_batch,
    heads, length, keys, chunk_queries, chunk_keys, chunk_tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LENGTH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T / sqrt(D) + bias) v for a tile of queries of one head, and the natural lse."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last chunk sees most keys: longest first
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    chunk = tile // chunk_tiles
    first = chunk * chunk_queries + tile % chunk_tiles * BLOCK_M
    rows = tl.minimum((chunk + 1) * chunk_queries, length) - first
    if rows <= 0:
        return  # the short last chunk has fewer tiles
    seen = tl.minimum((chunk + 1) * chunk_keys, keys)
    if HAS_LENGTH:
        seen = tl.minimum(seen, tl.load(key_length + batch))
    whole = seen // BLOCK_N * BLOCK_N

    q += batch * q_batch + head * q_head + first.to(tl.int64) * q_row
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    bias += batch * bias_batch
    queries = load_tile(q, q_row, rows, BLOCK_M, D, BLOCK_D, True)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums, total, top = attend(
        sums, total, top, queries, k, v, bias, k_row, v_row, 0, whole,
        BLOCK_N, D, BLOCK_D, HAS_BIAS, False,
    )  # fmt: skip
    k += whole.to(tl.int64) * k_row
    v += whole.to(tl.int64) * v_row
    sums, total, top = attend(
        sums, total, top, queries, k, v, bias + whole, k_row, v_row, whole, seen,
        BLOCK_N, D, BLOCK_D, HAS_BIAS, True,
    )  # fmt: skip

    # A query that sees no key gives zeros; with +inf its weights are zeros in the backward pass too.
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    sums /= total[:, None]
    r = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_D)[None, :]
    row = (batch * length + first) * heads + head
    at = out + row * D + r[:, None] * (heads * D) + c
    tl.store(at, sums.to(out.dtype.element_ty), mask=(r[:, None] < rows) & (c < D))
    at = lse + (batch * heads + head) * length + first + r
    tl.store(at, tl.where(empty, float("inf"), (top + tl.math.log2(total)) * LN2), mask=r < rows)


def fit(tile: Tile, queries: int, keys: int) -> Tile:
    """The tile for fewer queries or keys than it holds: 16 at least, a product's smallest side."""
    queries = min(tile.queries, max(16, triton.next_power_of_2(queries)))
    keys = min(tile.keys, max(16, triton.next_power_of_2(keys)))
    return tile._replace(queries=queries, keys=keys)


class Chunks(NamedTuple):
    """How many queries and keys a chunk has; without chunks all are one."""

    queries: int
    keys: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, chunk_tokens: int | None) -> Chunks:
        return cls(q.shape[1], k.shape[1]) if chunk_tokens is None else cls(chunk_tokens, chunk_tokens)


def dense(x: Tensor) -> Tensor:
    """x with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Those of a [B, L, H, D] tensor's first three dimensions; the last is contiguous."""
    return x.stride(0), x.stride(1), x.stride(2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: Tensor | None,
    key_bias: Tensor | None,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """Launch `forward_kernel`: q [B, L, H, D], k and v [B, M, H, D], D 128 at most; with chunks M <= L.

    key_length [B] int32; key_bias [B, M] float32.  Only the last dimension of each must be contiguous, else
    it is copied.  Returns out [B, L, H, D], contiguous, and the scores' natural log-sum-exp [B, H, L]
    float32, +inf for a query that sees no key.
    """
    q, k, v = (dense(x) for x in (q, k, v))
    key_bias = None if key_bias is None else dense(key_bias)
    batch, length, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    chunks = Chunks.of(q, k, chunk_tokens)
    block_d = max(16, triton.next_power_of_2(width))
    tile = fit(FORWARD[block_d, q.element_size()], min(chunks.queries, length), k.shape[1])
    chunk_tiles = triton.cdiv(chunks.queries, tile.queries)
    launch(
        forward_kernel, (triton.cdiv(length, chunks.queries) * chunk_tiles, batch * heads),
        q, k, v, q if key_length is None else key_length, q if key_bias is None else key_bias, out, lse,
        *strides(q), *strides(k), *strides(v), 0 if key_bias is None else key_bias.stride(0),
        heads, length, k.shape[1], *chunks, chunk_tiles,
        D=width, BLOCK_M=tile.queries, BLOCK_N=tile.keys, BLOCK_D=block_d,
        HAS_LENGTH=key_length is not None, HAS_BIAS=key_bias is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, lse


HELPERS = ("attend", "load_tile")
_CONSTANTS = ("D", "BLOCK_M", "BLOCK_N", "BLOCK_D", "HAS_LENGTH", "HAS_BIAS", "EXACT")


def types(kernel: triton.JITFunction, size: int) -> dict[str, str]:
    """The signature of a kernel for elements of `size` bytes; what is no pointer is a size or a stride."""
    pointers = {
        **dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), "*bf16" if size == 2 else "*fp32"),
        **dict.fromkeys(("bias", "lse", "delta", "dbias"), "*fp32"),
        "key_length": "*i32",
    }
    return {name: pointers.get(name, "i32") for name in kernel.arg_names if name not in _CONSTANTS}


def specializations(
    kernel: triton.JITFunction, table: Mapping[tuple[int, int], Tile], **more: bool
) -> Iterator[Specialization]:
    """The forms of a kernel: each of its tiles with a key length and a bias, the model's also without.
    `more`: further constants."""
    for (width, size), tile in table.items():
        for extras in (True, False) if (width, size) == (128, 2) else (True,):
            values = (width, tile.queries, tile.keys, width, extras, extras)
            constants = {**dict(zip(_CONSTANTS, values, strict=False)), **more}
            yield Specialization(kernel, types(kernel, size), constants, tile.num_warps, tile.num_stages)


KERNELS = tuple(specializations(forward_kernel, FORWARD))

"""Attention over chunks, backward: the weights are computed again from the scores and their log-sum-exp.

With p the weights of a query, o its output and g that output's gradient: dv = p^T g, and the scores'
gradient is p (g v^T - delta) with delta = g . o.  One kernel holds a tile of keys and walks the queries
that see it (dk, dv and the bias's), another holds a tile of queries and walks the keys they see (dq).
Neither kind of tile spans two chunks, so no tile outside the mask is visited.  No atomics: the same inputs
give the same bits.

The stored o is rounded; with it, the bias's gradient, a sum over all queries, erred twice as much as eager's
in bfloat16 on an H100.  Where it is wanted, delta is p . (g v^T), for two more products a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_attention import LOG2E, Chunks, Tile, dense, fit, load_tile, specializations, strides, types
from .launching import launch
from .specialization import Specialization

# As `chunk_attention.FORWARD`; a tile's queries and keys are the same in both, whichever of them is walked.
KEYS = {
    (16, 2): Tile(64, 128, 8, 2),  # 17 KB
    (32, 2): Tile(64, 128, 8, 2),  # 33 KB
    (64, 2): Tile(64, 128, 8, 2),  # 65 KB
    (128, 2): Tile(32, 128, 8, 2),  # 97 KB
    (16, 4): Tile(32, 32, 4, 2),  # 12 KB
    (32, 4): Tile(32, 32, 4, 2),  # 20 KB
    (64, 4): Tile(32, 32, 8, 1),  # 36 KB
    (128, 4): Tile(16, 32, 8, 1),  # 50 KB
}
QUERIES = {
    (16, 2): Tile(128, 64, 8, 2),  # 16 KB
    (32, 2): Tile(128, 64, 8, 2),  # 32 KB
    (64, 2): Tile(128, 64, 8, 2),  # 64 KB
    (128, 2): Tile(128, 64, 8, 2),  # 128 KB
    (16, 4): Tile(32, 32, 4, 2),  # 12 KB
    (32, 4): Tile(32, 32, 4, 2),  # 20 KB
    (64, 4): Tile(32, 32, 8, 1),  # 32 KB
    (128, 4): Tile(16, 16, 8, 1),  # 32 KB
}
DELTA_ROWS = 32  # queries a program of `delta_kernel`


@triton.jit
def delta_kernel(
    out, grad, delta, grad_batch, grad_row, grad_head, heads, length,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta [B, H, L] = sum over D of out (contiguous) * grad (strided)."""
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = length - first
    out += ((batch * length + first) * heads + head) * D
    grad += batch * grad_batch + head * grad_head + first * grad_row
    o = load_tile(out, heads * D, rows, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    g = load_tile(grad, grad_row, rows, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    r = tl.arange(0, BLOCK_M)
    tl.store(delta + (batch * heads + head) * length + first + r, tl.sum(o * g, 1), mask=r < rows)


@triton.jit
def walk_queries(
    dk, dv, dbias, k, v, bias, q, grad, lse, delta, q_row, grad_row, first, last,
    BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add queries first..last to a tile of keys' gradients; `q`, `grad`, `lse`, `delta` point at `first`.

    Transposed, [keys, queries], so that the weights enter both products as they are.
    """
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    columns = tl.arange(0, BLOCK_M)
    for start in tl.range(first, last, BLOCK_M, num_stages=1 if MASKED else None):
        queries = load_tile(q, q_row, last - start, BLOCK_M, D, BLOCK_D, MASKED)
        if MASKED:  # +inf: a query that is not there weighs nothing
            inside = columns < last - start
            top = tl.load(lse + columns, mask=inside, other=float("inf")) * LOG2E
            drop = tl.load(delta + columns, mask=inside, other=0.0)
        else:
            top = tl.load(lse + columns) * LOG2E
            drop = tl.load(delta + columns)
        scores = tl.dot(k, tl.trans(queries), input_precision="ieee") * SCALE
        if HAS_BIAS:
            scores += bias[:, None]
        weights = tl.math.exp2(scores - top[None, :])
        grads = load_tile(grad, grad_row, last - start, BLOCK_M, D, BLOCK_D, MASKED)
        dv = tl.dot(weights.to(grads.dtype), grads, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(grads), input_precision="ieee")
        dscores = weights * (dweights - drop[None, :])
        dk = tl.dot(dscores.to(queries.dtype), queries, dk, input_precision="ieee")
        if HAS_BIAS:
            dbias += tl.sum(dscores, 1)
        q += BLOCK_M * q_row
        grad += BLOCK_M * grad_row
        lse += BLOCK_M
        delta += BLOCK_M
    return dk, dv, dbias


@triton.jit
def keys_kernel(
    q, k, v, key_length, bias, grad, lse, delta, dk, dv, dbias,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head, bias_batch,
    heads, length, keys, chunk_queries, chunk_keys, chunk_tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LENGTH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dk, dv and the bias's gradient for one tile of keys of one head."""
    tile = tl.program_id(0)  # the first chunk is seen by most queries: longest first
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    chunk = tile // chunk_tiles
    first = chunk * chunk_keys + tile % chunk_tiles * BLOCK_N
    rows = tl.minimum((chunk + 1) * chunk_keys, keys) - first
    if rows <= 0:
        return
    start = chunk * chunk_queries  # the first query that sees these keys; all later ones do
    visible = rows
    if HAS_LENGTH:
        visible = tl.minimum(rows, tl.load(key_length + batch) - first)
        start = tl.where(visible > 0, start, length)
    whole = (length - start) // BLOCK_M * BLOCK_M

    r = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_D)[None, :]
    keys_tile = load_tile(k + batch * k_batch + head * k_head + first.to(tl.int64) * k_row,
                          k_row, visible, BLOCK_N, D, BLOCK_D, True)  # fmt: skip
    values_tile = load_tile(v + batch * v_batch + head * v_head + first.to(tl.int64) * v_row,
                            v_row, visible, BLOCK_N, D, BLOCK_D, True)  # fmt: skip
    if HAS_BIAS:
        added = tl.load(bias + batch * bias_batch + first + r, mask=r < visible, other=0.0) * LOG2E
    else:
        added = tl.zeros((BLOCK_N,), tl.float32)
    q += batch * q_batch + head * q_head + start.to(tl.int64) * q_row
    grad += batch * grad_batch + head * grad_head + start.to(tl.int64) * grad_row
    lse += (batch * heads + head) * length + start
    delta += (batch * heads + head) * length + start
    dk_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dbias_sum = tl.zeros((BLOCK_N,), tl.float32)
    dk_sum, dv_sum, dbias_sum = walk_queries(
        dk_sum, dv_sum, dbias_sum, keys_tile, values_tile, added, q, grad, lse, delta, q_row, grad_row,
        start, start + whole, BLOCK_M, D, BLOCK_D, HAS_BIAS, False,
    )  # fmt: skip
    q += whole.to(tl.int64) * q_row
    grad += whole.to(tl.int64) * grad_row
    dk_sum, dv_sum, dbias_sum = walk_queries(
        dk_sum, dv_sum, dbias_sum, keys_tile, values_tile, added, q, grad, lse + whole, delta + whole,
        q_row, grad_row, start + whole, length, BLOCK_M, D, BLOCK_D, HAS_BIAS, True,
    )  # fmt: skip

    # A row past the key length was computed from zeros: it is no key's, whatever came out.
    seen = r < visible
    row = (batch * keys + first) * heads + head
    at = row * D + r[:, None] * (heads * D) + c
    stored = (r[:, None] < rows) & (c < D)
    dk_sum = tl.where(seen[:, None], dk_sum * D**-0.5, 0.0)
    tl.store(dk + at, dk_sum.to(dk.dtype.element_ty), mask=stored)
    tl.store(dv + at, tl.where(seen[:, None], dv_sum, 0.0).to(dv.dtype.element_ty), mask=stored)
    if HAS_BIAS:
        at = dbias + (batch * heads + head) * keys + first + r
        tl.store(at, tl.where(seen, dbias_sum, 0.0), mask=r < rows)


@triton.jit
def walk_keys(
    dq, q, grad, top, delta, k, v, bias, k_row, v_row, first, last,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add keys first..last to the gradient of a tile of queries; `k`, `v` and `bias` point at `first`."""
    for start in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED else None):
        keys, weights, dweights = weigh_keys(
            q, grad, top, k, v, bias, k_row, v_row, last - start, BLOCK_N, D, BLOCK_D, HAS_BIAS, MASKED
        )
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(keys.dtype), keys, dq, input_precision="ieee")
        k += BLOCK_N * k_row
        v += BLOCK_N * v_row
        bias += BLOCK_N
    return dq


@triton.jit
def sum_keys(
    delta, q, grad, top, k, v, bias, k_row, v_row, first, last,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add keys first..last to the delta of a tile of queries: of what was never rounded."""
    for start in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED else None):
        _, weights, dweights = weigh_keys(
            q, grad, top, k, v, bias, k_row, v_row, last - start, BLOCK_N, D, BLOCK_D, HAS_BIAS, MASKED
        )
        delta += tl.sum(weights * dweights, 1)
        k += BLOCK_N * k_row
        v += BLOCK_N * v_row
        bias += BLOCK_N
    return delta


@triton.jit
def weigh_keys(
    q, grad, top, k, v, bias, k_row, v_row, rows,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of `rows` keys (BLOCK_N without MASKED), the weights of a tile of queries and their gradient."""
    SCALE: tl.constexpr = D**-0.5 * LOG2E
    columns = tl.arange(0, BLOCK_N)
    keys = load_tile(k, k_row, rows, BLOCK_N, D, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * SCALE
    if HAS_BIAS:
        scores += tl.load(bias + columns, mask=columns < rows, other=0.0)[None, :] * LOG2E
    weights = tl.math.exp2(scores - top[:, None])
    if MASKED:
        weights = tl.where((columns < rows)[None, :], weights, 0.0)
    values = load_tile(v, v_row, rows, BLOCK_N, D, BLOCK_D, MASKED)
    return keys, weights, tl.dot(grad, tl.trans(values), input_precision="ieee")


@triton.jit
def queries_kernel(
    q, k, v, key_length, bias, grad, lse, delta, dq,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head, bias_batch,
    heads, length, keys, chunk_queries, chunk_keys, chunk_tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LENGTH: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dq for one tile of queries of one head, over the keys that `forward_kernel` showed it.

    EXACT: delta is computed and stored, not read.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    chunk = tile // chunk_tiles
    first = chunk * chunk_queries + tile % chunk_tiles * BLOCK_M
    rows = tl.minimum((chunk + 1) * chunk_queries, length) - first
    if rows <= 0:
        return
    seen = tl.minimum((chunk + 1) * chunk_keys, keys)
    if HAS_LENGTH:
        seen = tl.minimum(seen, tl.load(key_length + batch))
    whole = seen // BLOCK_N * BLOCK_N

    r = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_D)[None, :]
    queries = load_tile(q + batch * q_batch + head * q_head + first.to(tl.int64) * q_row,
                        q_row, rows, BLOCK_M, D, BLOCK_D, True)  # fmt: skip
    grads = load_tile(grad + batch * grad_batch + head * grad_head + first.to(tl.int64) * grad_row,
                      grad_row, rows, BLOCK_M, D, BLOCK_D, True)  # fmt: skip
    at = (batch * heads + head) * length + first + r
    top = tl.load(lse + at, mask=r < rows, other=float("inf")) * LOG2E
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    bias += batch * bias_batch
    if EXACT:
        drop = tl.zeros((BLOCK_M,), tl.float32)
        drop = sum_keys(
            drop, queries, grads, top, k, v, bias, k_row, v_row, 0, whole,
            BLOCK_N, D, BLOCK_D, HAS_BIAS, False,
        )  # fmt: skip
        drop = sum_keys(
            drop, queries, grads, top, k + whole.to(tl.int64) * k_row, v + whole.to(tl.int64) * v_row,
            bias + whole, k_row, v_row, whole, seen, BLOCK_N, D, BLOCK_D, HAS_BIAS, True,
        )  # fmt: skip
        tl.store(delta + at, drop, mask=r < rows)
    else:
        drop = tl.load(delta + at, mask=r < rows, other=0.0)
    dq_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq_sum = walk_keys(
        dq_sum, queries, grads, top, drop, k, v, bias, k_row, v_row, 0, whole,
        BLOCK_N, D, BLOCK_D, HAS_BIAS, False,
    )  # fmt: skip
    k += whole.to(tl.int64) * k_row
    v += whole.to(tl.int64) * v_row
    dq_sum = walk_keys(
        dq_sum, queries, grads, top, drop, k, v, bias + whole, k_row, v_row, whole, seen,
        BLOCK_N, D, BLOCK_D, HAS_BIAS, True,
    )  # fmt: skip
    row = (batch * length + first) * heads + head
    at = dq + row * D + r[:, None] * (heads * D) + c
    tl.store(at, (dq_sum * D**-0.5).to(dq.dtype.element_ty), mask=(r[:, None] < rows) & (c < D))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    chunk_tokens: int | None,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels: grad [B, L, H, D] is out's gradient, the rest is `chunk_attention.forward`'s.

    Returns contiguous dq, dk and dv, shaped and typed as q, k and v, and the bias's gradient [B, M] float32,
    empty without `bias_gradient`, which takes a bias.
    """
    batch, length, heads, width = q.shape
    keys = k.shape[1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    grad, q, k, v = (dense(x) for x in (grad, q, k, v))
    key_bias = None if key_bias is None else dense(key_bias)
    delta = torch.empty_like(lse)
    dbias = lse.new_empty((batch, heads, keys) if key_bias is not None else 0)
    chunks = Chunks.of(q, k, chunk_tokens)
    block_d = max(16, triton.next_power_of_2(width))
    size = block_d, q.element_size()

    if not bias_gradient:
        launch(
            delta_kernel, (triton.cdiv(length, DELTA_ROWS), batch * heads),
            out, grad, delta, *strides(grad), heads, length, D=width, BLOCK_M=DELTA_ROWS, BLOCK_D=block_d
        )  # fmt: skip
    inputs = q, k, v, q if key_length is None else key_length, q if key_bias is None else key_bias
    steps = (
        *strides(q), *strides(k), *strides(v), *strides(grad),
        0 if key_bias is None else key_bias.stride(0), heads, length, keys, *chunks,
    )  # fmt: skip
    keys_tile = fit(KEYS[size], length, min(chunks.keys, keys))
    queries_tile = fit(QUERIES[size], min(chunks.queries, length), keys)
    exact = {"EXACT": bias_gradient}  # then `queries_kernel` writes the delta that `keys_kernel` reads
    for kernel, tile, total, chunk, held, outputs, more in (
        (queries_kernel, queries_tile, length, chunks.queries, queries_tile.queries, (dq,), exact),
        (keys_kernel, keys_tile, keys, chunks.keys, keys_tile.keys, (dk, dv, dbias), {}),
    ):
        chunk_tiles = triton.cdiv(chunk, held)
        launch(
            kernel, (triton.cdiv(total, chunk) * chunk_tiles, batch * heads),
            *inputs, grad, lse, delta, *outputs, *steps, chunk_tiles,
            D=width, BLOCK_M=tile.queries, BLOCK_N=tile.keys, BLOCK_D=block_d,
            HAS_LENGTH=key_length is not None, HAS_BIAS=key_bias is not None, **more,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dq, dk, dv, dbias.sum(1) if bias_gradient else lse.new_empty(0)


HELPERS = ("sum_keys", "walk_keys", "walk_queries", "weigh_keys")
KERNELS = (
    Specialization(delta_kernel, types(delta_kernel, 2), {"D": 128, "BLOCK_M": DELTA_ROWS, "BLOCK_D": 128}),
    *specializations(keys_kernel, KEYS),
    *specializations(queries_kernel, QUERIES, EXACT=False),
    *specializations(queries_kernel, QUERIES, EXACT=True),
)

"""Attention of a tile of queries to few keys, tile by tile: part of other kernels.

Scores, softmax and sums are float32; the weights are rounded to the values' dtype for the tensor cores.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
PRECISION = tl.constexpr("tf32x3")  # of float32 operands: one tf32 product errs by a thousandth
LOWEST = tl.constexpr(-3.0e38)  # less than any score, but finite
NARROWEST = tl.constexpr(16)  # keys: a tensor core's


@triton.jit
def walk_keys(
    summed, total, top, q, k, v, bias, first, last, heads, factor,
    D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Let a tile of queries see keys first..last, BLOCK_N at a time; without MASKED they fill whole tiles.

    `summed`: the values so far, weighted by 2^(score - top); `total`: those weights' sum; `top`: the largest
    score, each times `factor`.  Online softmax: Milakov and Gimelshein, arXiv 1805.02867.
    """
    columns = tl.arange(0, D)[None, :]
    for start in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED else None):
        key = start + tl.arange(0, BLOCK_N)
        inside = key < last
        at = (key * heads * D)[:, None] + columns
        k_tile = load_keys(k + at, inside, MASKED)
        v_tile = load_keys(v + at, inside, MASKED)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        if HAS_BIAS:
            added = tl.load(bias + key, mask=inside, other=0.0) if MASKED else tl.load(bias + key)
            scores = scores * factor + (added * LOG2_E)[None, :]
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
        else:
            higher = tl.maximum(top, tl.max(scores, 1) * factor)
            weights = tl.exp2(scores * factor - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(weights.to(v_tile.dtype), v_tile, summed * shrink[:, None], input_precision=PRECISION)
        top = higher
    return summed, total, top


@triton.jit
def load_keys(at, inside, MASKED: tl.constexpr):
    """The keys or values at `at` [keys, D]; zeros for those not inside."""
    return tl.load(at, mask=inside[:, None], other=0.0) if MASKED else tl.load(at)


@triton.jit
def attend_keys(
    q, k, v, bias, keys, heads, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T * scale + bias) v over all `keys`: q [BLOCK_M, D] values -> [BLOCK_M, D] float32.

    k and v point at the first key of one head, bias at its first key.  What does not fill a tile of BLOCK_N
    goes by the narrowest that tensor cores take, masked.
    """
    # Finite, so that a first tile of hidden keys gives weights of 0, not exp2(-inf + inf).
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, D], tl.float32)
    factor = scale * LOG2_E
    whole = keys // BLOCK_N * BLOCK_N
    summed, total, top = walk_keys(
        summed, total, top, q, k, v, bias, 0, whole, heads, factor, D, BLOCK_N, HAS_BIAS, False
    )
    summed, total, top = walk_keys(
        summed, total, top, q, k, v, bias, whole, keys, heads, factor, D, NARROWEST, HAS_BIAS, True
    )
    return summed / total[:, None]


@triton.jit
def visible_end(bias, keys, BLOCK_KEYS: tl.constexpr):
    """One more than the last of `keys` whose bias does not hide it."""
    key = tl.arange(0, BLOCK_KEYS)
    added = tl.load(bias + key, mask=key < keys, other=float("-inf"))
    return tl.max(tl.where(added != float("-inf"), key + 1, 0), 0)


HELPERS = ("attend_keys", "load_keys", "visible_end", "walk_keys")

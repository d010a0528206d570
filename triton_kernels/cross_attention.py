"""Attention to few keys: every query of a tile against all of them, without a mask between tokens.

Scores, softmax and sums are float32; the weights are rounded to the values' dtype for the tensor cores.
Scores are kept as q . k; the softmax scale and the change to base 2 are one factor inside exp2.

For text and image there are two kernels.  One reads the keys and values again for every tile of queries: 148
KB a tile, 1.1 GB from the L2 cache at the published size, where queries and output are 0.25 GB.  The other,
for the published 257 image keys, holds a head's keys and values in shared memory and walks its queries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialization import Specialization

LOG2_E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
PRECISION = tl.constexpr("tf32x3")  # of float32 operands: one tf32 product errs by a thousandth
LOWEST = tl.constexpr(-3.0e38)  # less than any score, but finite
NARROWEST = tl.constexpr(16)  # keys: a tensor core's
FURTHER = tl.constexpr(32)  # text keys at a time that `resident_kernel` does not hold


@dataclasses.dataclass(frozen=True)
class Tile:
    """How much a program holds at a time."""

    queries: int
    text: int  # keys
    image: int  # keys
    warps: int
    stages: int


# By head dimension and bytes an element.  None spills but float32 at 128.  At (128, 2) two programs share a
# multiprocessor; with a mask in every tile of keys, 12,096 queries of 40 heads, 33 text keys and 257 image
# keys took 0.312 ms on an H100 80GB, other tiles (64 or 128 queries, 4 or 8 warps, 2 or 3 stages) to 0.366.
TILES: Mapping[tuple[int, int], Tile] = MappingProxyType(
    {
        (16, 2): Tile(queries=64, text=32, image=64, warps=4, stages=2),
        (32, 2): Tile(queries=64, text=32, image=64, warps=4, stages=2),
        (64, 2): Tile(queries=64, text=32, image=64, warps=4, stages=2),
        (128, 2): Tile(queries=64, text=32, image=64, warps=4, stages=3),
        (16, 4): Tile(queries=64, text=32, image=64, warps=4, stages=2),
        (32, 4): Tile(queries=64, text=32, image=64, warps=4, stages=2),
        (64, 4): Tile(queries=64, text=32, image=32, warps=4, stages=2),
        (128, 4): Tile(queries=64, text=32, image=32, warps=4, stages=2),
    }
)


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
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * factor
        if HAS_BIAS:
            added = tl.load(bias + key, mask=inside, other=0.0) if MASKED else tl.load(bias + key)
            scores += (added * LOG2_E)[None, :]
        if MASKED:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
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
def dual_cross_attention_kernel(
    q, text_k, text_v, image_k, image_v, text_bias, out,
    length, heads, text_keys, image_keys, bias_stride, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_TEXT: tl.constexpr, BLOCK_IMAGE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out = attend(q, text) + attend(q, image) for one (tile of queries, head, batch).

    With a bias, whose row fits BLOCK_KEYS, the text ends at its last key that is not hidden: the unused
    end of a buffer of fixed length is not read and costs nothing.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < length)[:, None]
    at = ((batch * length + row) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    query = tl.load(q + at, mask=inside, other=0.0)
    first = (batch * text_keys * heads + head) * D
    bias = text_bias + batch * bias_stride
    end = text_keys
    if HAS_BIAS:
        end = visible_end(bias, text_keys, BLOCK_KEYS)
    summed = attend_keys(
        query, text_k + first, text_v + first, bias, end, heads, scale,
        D, BLOCK_M, BLOCK_TEXT, HAS_BIAS,
    )  # fmt: skip
    first = (batch * image_keys * heads + head) * D
    summed += attend_keys(
        query, image_k + first, image_v + first, text_bias, image_keys, heads, scale,
        D, BLOCK_M, BLOCK_IMAGE, False,
    )  # fmt: skip
    tl.store(out + at, summed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def visible_end(bias, keys, BLOCK_KEYS: tl.constexpr):
    """One more than the last of `keys` whose bias does not hide it."""
    key = tl.arange(0, BLOCK_KEYS)
    added = tl.load(bias + key, mask=key < keys, other=float("-inf"))
    return tl.max(tl.where(added != float("-inf"), key + 1, 0), 0)


@triton.jit
def text_scores(
    q, k, bias, start, end, factor, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Scores times `factor` of BLOCK_N text keys from `start` on; -inf from `end` on."""
    key = start + tl.arange(0, BLOCK_N)
    inside = key < end
    tile = load_keys(k + (key * HEADS * D)[:, None] + tl.arange(0, D)[None, :], inside, True)
    scores = tl.dot(q, tl.trans(tile)) * factor
    if HAS_BIAS:
        scores += (tl.load(bias + key, mask=inside, other=0.0) * LOG2_E)[None, :]
    return tl.where(inside[None, :], scores, float("-inf"))


@triton.jit
def weigh_text(
    total, top, q, k, bias, start, end, factor, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The sum of weights and the largest score, once text keys start..end are seen too."""
    for key in tl.range(start, end, BLOCK_N, num_stages=1):
        scores = text_scores(q, k, bias, key, end, factor, D, HEADS, BLOCK_N, HAS_BIAS)
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        top = higher
    return total, top


@triton.jit
def see_text(
    summed, share, top, q, k, v, bias, start, end, factor, D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add text values start..end, weighted by share * 2^(score - top)."""
    for key in tl.range(start, end, BLOCK_N, num_stages=1):
        scores = text_scores(q, k, bias, key, end, factor, D, HEADS, BLOCK_N, HAS_BIAS)
        weights = tl.exp2(scores - top[:, None]) * share[:, None]
        row = key + tl.arange(0, BLOCK_N)
        tile = load_keys(v + (row * HEADS * D)[:, None] + tl.arange(0, D)[None, :], row < end, True)
        summed = tl.dot(weights.to(tile.dtype), tile, summed)
    return summed


@triton.jit
def see_resident(summed, total, top, q, k, v, factor):
    """Let a tile of queries see keys and values that are held; the state is `walk_keys`'."""
    scores = tl.dot(q, tl.trans(k))
    higher = tl.maximum(top, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - higher[:, None])
    fade = tl.exp2(top - higher)
    summed = tl.dot(weights.to(v.dtype), v, summed * fade[:, None])
    return summed, total * fade + tl.sum(weights, 1), higher


@triton.jit
def resident_kernel(
    q, text_k, text_v, image_k, image_v, text_bias, out,
    batch_size, length, text_keys, image_keys, bias_stride, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, IMAGE: tl.constexpr, REST: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """As `dual_cross_attention_kernel`, for a program's share of all (head, tile of queries), in that order.

    Held are the first IMAGE image keys, in halves, and the REST: the image's tail of NARROWEST keys at most,
    then the first text keys.  Further text keys are read for every tile, once for the softmax's statistics
    and once for the values.  A head's last tile begins where its rows still are BLOCK_M: it repeats some.

    Both softmaxes end in one sum: text weights are given the image's total by its own, and the sum is
    divided by the image's total.
    """
    factor = scale * LOG2_E
    token = tl.full((), HEADS * D, tl.int64)  # elements from a token to the next
    head_tiles = tl.cdiv(length, BLOCK_M)
    tiles = head_tiles * HEADS * batch_size
    begin = tl.program_id(0) * tiles // tl.num_programs(0)
    end = (tl.program_id(0) + 1) * tiles // tl.num_programs(0)
    columns = tl.arange(0, D)[None, :]
    for pair in tl.range(begin // head_tiles, tl.cdiv(end, head_tiles), num_stages=1):
        batch = pair // HEADS
        head = pair % HEADS
        first = batch * image_keys * token + head * D
        at = (tl.arange(0, IMAGE // 2) * HEADS * D)[:, None] + columns
        k_low = tl.load(image_k + first + at)
        v_low = tl.load(image_v + first + at)
        at += IMAGE // 2 * HEADS * D
        k_high = tl.load(image_k + first + at)
        v_high = tl.load(image_v + first + at)
        rest = tl.arange(0, REST)
        is_image = rest < NARROWEST
        in_image = is_image & (IMAGE + rest < image_keys)
        at = ((IMAGE + rest) * HEADS * D)[:, None] + columns
        k_rest = load_keys(image_k + first + at, in_image, True)
        v_rest = load_keys(image_v + first + at, in_image, True)
        first = batch * text_keys * token + head * D
        bias = text_bias + batch * bias_stride
        text_end = visible_end(bias, text_keys, BLOCK_KEYS) if HAS_BIAS else text_keys
        key = rest - NARROWEST
        in_text = (key >= 0) & (key < text_end)
        at = (key * HEADS * D)[:, None] + columns
        k_rest += load_keys(text_k + first + at, in_text, True)
        v_rest += load_keys(text_v + first + at, in_text, True)
        added = tl.where(in_image | in_text, 0.0, float("-inf"))
        if HAS_BIAS:
            added += tl.load(bias + key, mask=in_text, other=0.0) * LOG2_E

        base = batch * length * token + head * D
        at = (tl.arange(0, BLOCK_M) * HEADS * D)[:, None] + columns
        first_tile = tl.maximum(begin - pair * head_tiles, 0)
        start = base + tl.minimum(first_tile * BLOCK_M, length - BLOCK_M) * token
        query = tl.load(q + start + at)
        for tile in tl.range(first_tile, tl.minimum(end - pair * head_tiles, head_tiles), num_stages=1):
            top = tl.full([BLOCK_M], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            summed = tl.zeros([BLOCK_M, D], tl.float32)
            summed, total, top = see_resident(summed, total, top, query, k_low, v_low, factor)
            summed, total, top = see_resident(summed, total, top, query, k_high, v_high, factor)
            scores = tl.dot(query, tl.trans(k_rest)) * factor + added[None, :]
            higher = tl.maximum(top, tl.max(tl.where(is_image[None, :], scores, float("-inf")), 1))
            text_top = tl.maximum(tl.max(tl.where(is_image[None, :], float("-inf"), scores), 1), LOWEST)
            weights = tl.exp2(scores - tl.where(is_image[None, :], higher[:, None], text_top[:, None]))
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(tl.where(is_image[None, :], weights, 0.0), 1)
            text_total = tl.sum(tl.where(is_image[None, :], 0.0, weights), 1)
            held_top = text_top
            text_total, text_top = weigh_text(
                text_total, text_top, query, text_k + first, bias, REST - NARROWEST, text_end, factor,
                D, HEADS, FURTHER, HAS_BIAS,
            )  # fmt: skip
            share = total / text_total
            held = share * tl.exp2(held_top - text_top)
            weights *= tl.where(is_image[None, :], 1.0, held[:, None])
            summed = tl.dot(weights.to(v_rest.dtype), v_rest, summed * fade[:, None])
            summed = see_text(
                summed, share, text_top, query, text_k + first, text_v + first, bias,
                REST - NARROWEST, text_end, factor, D, HEADS, FURTHER, HAS_BIAS,
            )  # fmt: skip
            # The next tile's queries arrive while this one's output leaves.
            to = out + start + at
            start = base + tl.minimum((tile + 1) * BLOCK_M, length - BLOCK_M) * token
            query = tl.load(q + start + at)
            tl.store(to, (summed / total[:, None]).to(out.dtype.element_ty))


@dataclasses.dataclass(frozen=True)
class Resident:
    """How `resident_kernel` is cut: 2-byte elements at head dimension 128 take 193 KB of shared memory."""

    queries: int = 128
    image: int = 256  # keys
    rest: int = 64  # keys: the image's and 48 of the text
    warps: int = 8


RESIDENT = Resident()


def fits_resident(q: Tensor, image_keys: int) -> bool:
    """Whether `resident_kernel` takes these queries and so many image keys."""
    return (
        (q.shape[-1], q.element_size()) == (128, 2)
        and q.shape[1] >= RESIDENT.queries
        and 0 <= image_keys - RESIDENT.image <= NARROWEST.value
    )


def dual_cross_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    text_bias: Tensor | None,
    tile: Tile | Resident | None = None,
) -> Tensor:
    """Launch one of the two kernels; arguments as `ops.dual_cross_attention`, all contiguous.

    `tile`: how, and of which kernel; None for `RESIDENT` where it fits, else `TILES`' own.
    """
    batch, length, heads, dim = q.shape
    out = torch.empty_like(q)
    if tile is None:
        tile = RESIDENT if fits_resident(q, image_k.shape[1]) else TILES[dim, q.element_size()]
    inputs = q, text_k, text_v, image_k, image_v, text_bias if text_bias is not None else q, out
    bias_stride = text_bias.shape[-1] if text_bias is not None and text_bias.ndim == 2 else 0
    block_keys = 1 if text_bias is None else triton.next_power_of_2(text_k.shape[1])
    if isinstance(tile, Resident):
        resident_kernel[(min(triton.cdiv(length, tile.queries) * heads * batch, _programs(q.device)),)](
            *inputs, batch, length, text_k.shape[1], image_k.shape[1], bias_stride, dim**-0.5,
            HEADS=heads, D=dim, BLOCK_M=tile.queries, IMAGE=tile.image, REST=tile.rest,
            BLOCK_KEYS=block_keys, HAS_BIAS=text_bias is not None, num_warps=tile.warps,
        )  # fmt: skip
        return out
    dual_cross_attention_kernel[(triton.cdiv(length, tile.queries), heads, batch)](
        *inputs, length, heads, text_k.shape[1], image_k.shape[1], bias_stride, dim**-0.5,
        D=dim, BLOCK_M=tile.queries, BLOCK_TEXT=tile.text, BLOCK_IMAGE=tile.image,
        BLOCK_KEYS=block_keys, HAS_BIAS=text_bias is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _programs(device: torch.device) -> int:
    """One a multiprocessor; in the interpreter, some."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


HELPERS = (
    "attend_keys",
    "load_keys",
    "see_resident",
    "see_text",
    "text_scores",
    "visible_end",
    "walk_keys",
    "weigh_text",
)
POINTERS = {2: "*bf16", 4: "*fp32"}  # by bytes an element
KERNELS = (
    *(
        Specialization(
            dual_cross_attention_kernel,
            {
                **dict.fromkeys(("q", "text_k", "text_v", "image_k", "image_v", "out"), POINTERS[size]),
                "text_bias": "*fp32" if has_bias else POINTERS[size],
                **dict.fromkeys(("length", "heads", "text_keys", "image_keys", "bias_stride"), "i32"),
                "scale": "fp32",
            },
            {
                "D": dim, "BLOCK_M": tile.queries, "BLOCK_TEXT": tile.text, "BLOCK_IMAGE": tile.image,
                "BLOCK_KEYS": 512 if has_bias else 1, "HAS_BIAS": has_bias,
            },
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        for (dim, size), tile in TILES.items()
        for has_bias in (False, True)
    ),
    *(
        Specialization(
            resident_kernel,
            {
                **dict.fromkeys(("q", "text_k", "text_v", "image_k", "image_v", "out"), "*bf16"),
                "text_bias": "*fp32" if has_bias else "*bf16",
                **dict.fromkeys(("batch_size", "length", "text_keys", "image_keys", "bias_stride"), "i32"),
                "scale": "fp32",
            },
            {
                "HEADS": 40, "D": 128, "BLOCK_M": RESIDENT.queries, "IMAGE": RESIDENT.image,
                "REST": RESIDENT.rest, "BLOCK_KEYS": 512 if has_bias else 1, "HAS_BIAS": has_bias,
            },
            num_warps=RESIDENT.warps,
        )
        for has_bias in (False, True)
    ),
)  # fmt: skip

"""Cross-attention to text and image with a head's image keys and values held in shared memory.

Read again for every tile of 64 queries they are 148 KB a tile, 1.1 GB from the L2 cache at the published
size, where queries and output are 0.25 GB.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from .key_attention import LOG2_E, LOWEST, NARROWEST, load_keys, visible_end
from .launching import launch
from .specialization import Specialization, multiprocessors

FURTHER = tl.constexpr(32)  # text keys at a time that `resident_kernel` does not hold


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
    BLOCK_KEYS: tl.constexpr, HAS_BIAS: tl.constexpr, BUT_TEXT: tl.constexpr,
):  # fmt: skip
    """As `dual_cross_attention_kernel`, for a program's share of all (head, tile of queries), in that order.

    Held are the first IMAGE image keys, in halves, and the REST: the image's tail of NARROWEST keys at most,
    then the first text keys.  Further text keys are read for every tile, once for the softmax's statistics
    and once for the values.  A head's last tile begins where its rows still are BLOCK_M: it repeats some.

    Both softmaxes end in one sum: text weights are given the image's total by its own, and the sum is
    divided by the image's total.

    Batches with BUT_TEXT visible text keys or fewer are left alone: another kernel's.
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
        bias = text_bias + batch * bias_stride
        text_end = visible_end(bias, text_keys, BLOCK_KEYS) if HAS_BIAS else text_keys
        if text_end > BUT_TEXT:
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
    """How `resident_kernel` is cut: 2-byte elements at head dimension 128 take 200 KB of shared memory."""

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


def launch_resident(inputs: tuple[Tensor | None, ...], tile: Resident, but_text: int = 0) -> None:
    """Launch `resident_kernel` on its first seven arguments, contiguous, of which the last is written; the
    text's bias may be None.

    but_text: batches with so many visible text keys, or fewer, are left alone; it takes a bias.
    """
    q, text_k, _, image_k, _, text_bias, _ = inputs
    assert q is not None and text_k is not None and image_k is not None
    batch, length, heads, dim = q.shape
    has_bias = text_bias is not None
    assert has_bias or not but_text
    bias_stride = text_bias.shape[-1] if text_bias is not None and text_bias.ndim == 2 else 0
    programs = min(triton.cdiv(length, tile.queries) * heads * batch, multiprocessors(q.device))
    launch(
        resident_kernel, (programs,),
        *(q if x is None else x for x in inputs),
        batch, length, text_k.shape[1], image_k.shape[1], bias_stride, dim**-0.5,
        HEADS=heads, D=dim, BLOCK_M=tile.queries, IMAGE=tile.image, REST=tile.rest,
        BLOCK_KEYS=triton.next_power_of_2(text_k.shape[1]) if has_bias else 1, HAS_BIAS=has_bias,
        BUT_TEXT=but_text,
        num_warps=tile.warps,
    )  # fmt: skip


HELPERS = ("see_resident", "see_text", "text_scores", "weigh_text")
KERNELS = tuple(
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
            "BUT_TEXT": but_text,
        },
        num_warps=RESIDENT.warps,
    )
    for has_bias, but_text in ((False, 0), (True, 0), (True, 48))
)  # fmt: skip

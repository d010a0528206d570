"""Attention to few keys: every query of a tile against all of them, without a mask between tokens.

Scores, softmax and sums are float32; the weights are rounded to the values' dtype for the tensor cores.
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


@dataclasses.dataclass(frozen=True)
class Tile:
    """How much a program holds at a time."""

    queries: int
    text: int  # keys
    image: int  # keys
    warps: int
    stages: int


# By head dimension and bytes an element.  Chosen from what ptxas reports for sm_90 (float32 at 128 spills,
# nothing else does), not yet from times on a GPU.  At (128, 2) two programs share a multiprocessor.
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
def attend_keys(
    q, k, v, bias, keys, heads, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T * scale + bias) v over all `keys`: q [BLOCK_M, D] values -> [BLOCK_M, D] float32.

    k and v point at the first key of one head, bias at its first key.  Online softmax: Milakov and
    Gimelshein, arXiv 1805.02867.
    """
    columns = tl.arange(0, D)
    # Finite, so that a first tile of hidden keys gives weights of 0, not exp2(-inf + inf).
    highest = tl.full([BLOCK_M], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        inside = key < keys
        at = (key * heads * D)[:, None] + columns[None, :]
        k_tile = tl.load(k + at, mask=inside[:, None], other=0.0)
        v_tile = tl.load(v + at, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)
        if HAS_BIAS:
            scores += (tl.load(bias + key, mask=inside, other=0.0) * LOG2_E)[None, :]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v_tile.dtype), v_tile, out * shrink[:, None], input_precision=PRECISION)
        highest = higher
    return out / total[:, None]


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
        key = tl.arange(0, BLOCK_KEYS)
        added = tl.load(bias + key, mask=key < text_keys, other=float("-inf"))
        end = tl.max(tl.where(added != float("-inf"), key + 1, 0), 0)
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


def dual_cross_attention(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, text_bias: Tensor | None
) -> Tensor:
    """Launch `dual_cross_attention_kernel`; arguments as `ops.dual_cross_attention`, all contiguous."""
    batch, length, heads, dim = q.shape
    out = torch.empty_like(q)
    tile = TILES[dim, q.element_size()]
    dual_cross_attention_kernel[(triton.cdiv(length, tile.queries), heads, batch)](
        q, text_k, text_v, image_k, image_v, text_bias if text_bias is not None else q, out,
        length, heads, text_k.shape[1], image_k.shape[1],
        text_bias.shape[-1] if text_bias is not None and text_bias.ndim == 2 else 0,
        dim**-0.5,
        D=dim, BLOCK_M=tile.queries, BLOCK_TEXT=tile.text, BLOCK_IMAGE=tile.image,
        BLOCK_KEYS=1 if text_bias is None else triton.next_power_of_2(text_k.shape[1]),
        HAS_BIAS=text_bias is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


HELPERS = ("attend_keys",)
POINTERS = {2: "*bf16", 4: "*fp32"}  # by bytes an element
KERNELS = tuple(
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
)  # fmt: skip

"""The two kernels of audio cross-attention: its plain form, and the softmax of its absorbed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .key_attention import LOG2_E, attend_keys
from .launching import launch
from .specialization import Specialization


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a program of the plain form is cut."""

    queries: int
    warps: int


# By head dimension.  64 divides the 1,344 tokens of a latent frame at 768 x 448.  At 128, on one
# H100: 0.091 ms; (128, 4) 0.095, (128, 8) 0.097, (64, 8) 0.102.
TILES: Mapping[int, Tile] = MappingProxyType(
    {16: Tile(64, 4), 32: Tile(64, 4), 64: Tile(64, 4), 128: Tile(64, 4)}
)
# One: no exchange through shared memory, no barrier, and 1,024 instructions a token where four warps take
# 1,760 (SASS for sm_90, 32 keys of 40 heads).  On an H100 at 768 x 448 one takes 0.028 ms, four took 0.078.
SOFTMAX_WARPS = 1


@triton.jit
def audio_cross_attention_kernel(
    q, k, v, out, length, heads, scale,
    D: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One (tile of queries, head, latent frame).  BLOCK_N >= KEYS: one tile of keys, a single pass."""
    head = tl.program_id(1)
    frame = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < length)[:, None]
    at = ((frame * length + row) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    query = tl.load(q + at, mask=inside, other=0.0)
    first = (frame * KEYS * heads + head) * D
    found = attend_keys(query, k + first, v + first, q, KEYS, heads, scale, D, BLOCK_M, BLOCK_N, False)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def grouped_softmax_kernel(
    scores, bias, out, length,
    KEYS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Softmax of scores + bias over the keys of every head, for one token's KEYS x HEADS scores."""
    row = tl.program_id(0).to(tl.int64)
    frame = row // length
    key = tl.arange(0, BLOCK_N)[:, None]
    head = tl.arange(0, BLOCK_H)[None, :]
    column = key * HEADS + head
    inside = (key < KEYS) & (head < HEADS)
    width: tl.constexpr = KEYS * HEADS
    x = tl.load(scores + row * width + column, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias + frame * width + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(key < KEYS, x * LOG2_E, float("-inf"))
    weights = tl.exp2(x - tl.max(x, 0)[None, :])
    weights /= tl.sum(weights, 0)[None, :]
    tl.store(out + row * width + column, weights.to(out.dtype.element_ty), mask=inside)


def audio_cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Launch `audio_cross_attention_kernel`; arguments as `ops.audio_cross_attention`, contiguous."""
    batch, frames, keys, heads, dim = k.shape
    length = q.shape[1] // frames
    out = torch.empty_like(q)
    tile = TILES[dim]
    launch(
        audio_cross_attention_kernel, (triton.cdiv(length, tile.queries), heads, batch * frames),
        q, k, v, out, length, heads, dim**-0.5,
        D=dim, KEYS=keys, BLOCK_M=tile.queries, BLOCK_N=_block(keys), num_warps=tile.warps,
    )  # fmt: skip
    return out


def grouped_softmax(scores: Tensor, bias: Tensor, keys: int) -> Tensor:
    """Launch `grouped_softmax_kernel`: scores [frames, S, keys * H], bias [frames, keys * H], contiguous."""
    frames, length, width = scores.shape
    heads = width // keys
    out = torch.empty_like(scores)
    launch(
        grouped_softmax_kernel, (frames * length,),
        scores, bias, out, length,
        KEYS=keys, HEADS=heads, BLOCK_N=triton.next_power_of_2(keys),
        BLOCK_H=triton.next_power_of_2(heads), num_warps=SOFTMAX_WARPS,
    )  # fmt: skip
    return out


def _block(keys: int) -> int:
    """The smallest tile that holds `keys` and that a tensor core takes."""
    return max(16, int(triton.next_power_of_2(keys)))


KERNELS = (
    *(
        Specialization(
            audio_cross_attention_kernel,
            {
                **dict.fromkeys(("q", "k", "v", "out"), kind),
                **dict.fromkeys(("length", "heads"), "i32"),
                "scale": "fp32",
            },
            {"D": dim, "KEYS": 32, "BLOCK_M": tile.queries, "BLOCK_N": _block(32)},
            num_warps=tile.warps,
        )
        for dim, tile in TILES.items()
        for kind in ("*bf16", "*fp32")
    ),
    *(
        Specialization(
            grouped_softmax_kernel,
            {**dict.fromkeys(("scores", "bias", "out"), kind), "length": "i32"},
            {"KEYS": 32, "HEADS": 40, "BLOCK_N": 32, "BLOCK_H": 64},
            num_warps=SOFTMAX_WARPS,
        )
        for kind in ("*bf16", "*fp32")
    ),
)

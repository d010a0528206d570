"""Attention to few keys: every query of a tile against all of them, without a mask between tokens.

Of any sizes here; where a head's image keys and values fit shared memory, `resident_attention` serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .key_attention import attend_keys, visible_end
from .launching import launch
from .resident_attention import RESIDENT, Resident, fits_resident, launch_resident
from .specialization import Specialization


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


def dual_cross_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    text_bias: Tensor | None,
    tile: Tile | Resident | None = None,
) -> Tensor:
    """Launch a kernel; arguments as `ops.dual_cross_attention`, all contiguous.

    `tile`: how, and of which kernel; None for `RESIDENT` where it fits, else the one of `TILES`.
    """
    batch, length, heads, dim = q.shape
    out = torch.empty_like(q)
    if tile is None:
        tile = RESIDENT if fits_resident(q, image_k.shape[1]) else TILES[dim, q.element_size()]
    inputs = q, text_k, text_v, image_k, image_v, text_bias, out
    if isinstance(tile, Resident):
        launch_resident(inputs, tile)
        return out
    bias_stride = text_bias.shape[-1] if text_bias is not None and text_bias.ndim == 2 else 0
    launch(
        dual_cross_attention_kernel, (triton.cdiv(length, tile.queries), heads, batch),
        *(q if x is None else x for x in inputs),
        length, heads, text_k.shape[1], image_k.shape[1], bias_stride, dim**-0.5,
        D=dim, BLOCK_M=tile.queries, BLOCK_TEXT=tile.text, BLOCK_IMAGE=tile.image,
        BLOCK_KEYS=1 if text_bias is None else triton.next_power_of_2(text_k.shape[1]),
        HAS_BIAS=text_bias is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


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

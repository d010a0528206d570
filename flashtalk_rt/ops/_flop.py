"""How many operations a call of an op asks for, from the call's arguments: for the floors of the benchmark.

A multiplication and an addition are two.  Counted are the products, in the form that the op computes them in;
what is done once an element (norms, softmax, bias, activations) is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .fp8 import Quantized


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_tokens: int | None = None,
    *,
    key_length: int | Tensor | None = None,
    key_bias: Tensor | None = None,
) -> int:
    """4 D for every query, each key that it sees (those of earlier chunks and its own, less the hidden ones)
    and each head; arguments as the op's."""
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    mask = reference.key_mask(k, key_length, key_bias)
    visible = torch.ones(1, keys) if mask is None else mask.cpu() > float("-inf")
    up_to = visible.expand(batch, keys).cumsum(1)
    chunk = chunk_tokens or max(queries, keys)
    last = ((torch.arange(queries) // chunk + 1) * chunk).clamp(max=keys) - 1
    return 4 * heads * dim * int(up_to[:, last].sum())


def dual_cross_attention(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, text_bias: Tensor | None
) -> int:
    """4 D for every query, each visible key of text and image, and each head."""
    batch, queries, heads, dim = q.shape
    seen = batch * image_k.shape[1]
    if text_bias is None:
        seen += batch * text_k.shape[1]
    else:
        seen += int((text_bias > float("-inf")).expand(batch, -1).sum())
    return 4 * heads * dim * queries * seen


def audio_cross_attention(q: Tensor, k: Tensor, v: Tensor) -> int:
    """4 D for every query, each key of its own frame, and each head."""
    return 4 * q.numel() * k.shape[2]


def absorbed_audio_attention(
    x: Tensor, A: Tensor, a_bias: Tensor, B: Tensor, num_heads: int, keys: int
) -> int:
    """The products with A and with B; making the two is not in the op."""
    return 4 * x.numel() * num_heads * keys


def pixel_attention(q: Tensor, k: Tensor, v: Tensor) -> int:
    """4 C for every two pixels of a frame."""
    return 4 * q.numel() * q.shape[-2]


def linear_fp8(x: Quantized, weight: Quantized, bias: Tensor | None, **rest: Any) -> int:
    return 2 * x.data.numel() * weight.data.shape[0]


def slice_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> int:
    """x [T, H, W, C] and weight [O, kt, k, k, C]: every tap of every pixel of T - kt + 1 frames."""
    frames = x.shape[0] - weight.shape[1] + 1
    return 2 * weight.numel() * frames * x.shape[1] * x.shape[2]


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> int:
    """The phase form: for every pixel of x [B, C, T, H, W], four convolutions of 2 x 2 taps to O channels."""
    return 2 * x.numel() * 4 * 4 * weight.shape[0]


def vae_head(x: Tensor, *rest: Any, weight: Tensor, **more: Any) -> int:
    """Every tap of every pixel of x [B, C, T, H, W], to O channels."""
    return 2 * weight[:, 0].numel() * x.numel()

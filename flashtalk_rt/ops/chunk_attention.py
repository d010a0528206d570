"""3D attention over chunks: bidirectional inside a chunk, causal between chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import attend


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Attention in which a token sees its own chunk and every earlier one.

    q, k, v: [B, L, H, D], one dtype.  `chunk_tokens`: tokens a chunk, None for one single chunk
    (full attention).  L need not be a multiple of it: the last chunk may be short.  Returns
    [B, L, H, D].  Keys outside the mask are never visited: each chunk is one unmasked attention
    over a prefix of the keys.
    """
    length = q.shape[1]
    if chunk_tokens is None or chunk_tokens >= length:
        return attend(q, k, v)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be 1 or more")
    parts = []
    for start in range(0, length, chunk_tokens):
        end = min(start + chunk_tokens, length)
        parts.append(attend(q[:, start:end], k[:, :end], v[:, :end]))
    return torch.cat(parts, dim=1)

"""Attention of every pixel of a frame to all of them, with one head as wide as the channels.

torch's flash kernels end at a head of 256; for the VAE's 384 it falls to a slow one (78 of an H100's 990
TFLOP/s).  In inference the explicit form is several times faster, if its scores fit: two products at the
speed of cuBLAS around one softmax, which computes in float32 and reads and writes the scores once.  Those
of 96 x 56 pixels are 58 MB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _flop
from . import reference_vae as reference
from ._dispatch import TORCH, Backend, Case, OpSpec, Situation, backend_for

WIDEST_FLASH_HEAD = 256
SCORES = 2**25  # at most at a time: 64 MB, and as much again behind the softmax


def _explicit(situation: Situation) -> str | None:
    if situation.device_type != "cuda":
        return f"pays on a CUDA device, this is {situation.device_type}"
    if situation.dtype != torch.float16:  # a score of 20 in bfloat16 is off by 0.06, its weight by 6%
        return f"rounds scores to float16, this is {situation.dtype}"
    if situation.head_dim is None or situation.head_dim <= WIDEST_FLASH_HEAD:
        return f"pays beyond a head of {WIDEST_FLASH_HEAD}, this is {situation.head_dim}"
    if situation.grad:
        return "would keep all scores for the gradient"
    return None


def pixel_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C)) v for q, k and v [B, T, pixels, C], every frame by itself; q's dtype."""
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if backend_for(SPEC, q.device, q.dtype, q.shape[-1], grad, wanted=backend) == "explicit":
        return explicit(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `pixel_attention`, as many queries at a time as keep within SCORES."""
    shape = q.shape
    # Scaled before the product, which float16 might not hold unscaled.
    q, k, v = (x.flatten(0, 1) for x in (q * shape[-1] ** -0.5, k, v))
    queries = max(1, SCORES // (k.shape[0] * k.shape[1]))
    parts = [torch.bmm(torch.bmm(rows, k.mT).softmax(-1), v) for rows in q.split(queries, dim=1)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(shape)


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`reference.pixel_attention` in the inputs' own precision throughout."""
    weights: Tensor = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v


def _case(batch: int, frames: int, pixels: int, channels: int, fixed: torch.dtype | None = None) -> Case:
    """fixed: the dtype, whatever is asked for."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        shape = (batch, frames, pixels, 3 * channels)
        drawn = torch.randn(shape, generator=generator, device=device).to(fixed or dtype)
        return dict(zip("qkv", drawn.chunk(3, dim=-1), strict=True))

    return Case(f"{batch}x{frames}x{pixels}x{channels}", make)


SPEC = OpSpec(
    "pixel_attention",
    (Backend("explicit", _explicit), TORCH),
    function=pixel_attention,
    reference=reference.pixel_attention,
    eager=_eager,
    cases=(_case(2, 3, 35, 48), _case(1, 1, 77, 384)),
    # In the dtype that the VAE runs in on a GPU.
    workload=_case(1, 1, 96 * 56, 384, fixed=torch.float16),
    flop=_flop.pixel_attention,
)

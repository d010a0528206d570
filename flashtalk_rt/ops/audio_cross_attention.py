"""Audio cross-attention: each latent frame's tokens against that frame's audio keys, in two forms.

Plain: q = x Wq^T + bq, attention, output projection.  Absorbed: q has no norm and a frame few keys, so
both projections fold into matrices of that frame:

    scores = (x Wq^T + bq)_h . K_h D^-0.5 = x A + a_bias
    out    = sum_h P_h V_h Wo_h^T + bo    = P B, for each head's weights P_h sum to 1: bo is in head 0's rows

A and B of 40 layers would be 9 GB, so they are made again for each layer in each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from . import _flop, reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for
from .dual_cross_attention import TRITON_HEADS

# --- the plain form ----------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk_rt::audio_cross_attention", mutates_args=())
def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from ..triton_kernels import audio_attention

    return audio_attention.audio_cross_attention(q, k, v)


@_kernel.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (reference.audio_cross_attention(q, k, v),)


differentiate_through(_kernel, _plain)


def audio_cross_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Each latent frame's tokens see that frame's audio keys alone.

    q [B, T*S, H, D] with S tokens a latent frame; k and v [B, T, N, H, D], one dtype -> [B, T*S, H, D] in
    q's dtype.  ValueError where the shapes do not belong together.
    """
    batch, tokens, heads, dim = q.shape
    if k.shape != v.shape or (k.shape[0], *k.shape[3:]) != (batch, heads, dim) or tokens % k.shape[1]:
        raise ValueError(f"keys {[*k.shape]} and values {[*v.shape]} do not fit q {[*q.shape]}")
    if backend_for(SPEC, q.device, q.dtype, dim, wanted=backend) == "triton":
        out: Tensor = _kernel(q.contiguous(), k.contiguous(), v.contiguous())
        return out
    return reference.audio_cross_attention(q, k, v)


# --- the absorbed form -------------------------------------------------------------------------------


def _plain_softmax(scores: Tensor, bias: Tensor, keys: int) -> tuple[Tensor]:
    wide = torch.promote_types(scores.dtype, torch.float32)
    grouped = (scores.to(wide) + bias[:, None].to(wide)).unflatten(-1, (keys, -1))
    return (grouped.softmax(-2).flatten(-2).to(scores.dtype),)


@torch.library.custom_op("flashtalk_rt::grouped_softmax", mutates_args=())
def _softmax(scores: Tensor, bias: Tensor, keys: int) -> Tensor:
    from ..triton_kernels import audio_attention

    return audio_attention.grouped_softmax(scores, bias, keys)


@_softmax.register_fake
def _(scores: Tensor, bias: Tensor, keys: int) -> Tensor:
    return torch.empty_like(scores)


differentiate_through(_softmax, _plain_softmax)


def _plain_products(x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor]:
    return ((torch.einsum("btnhd,hdw->btnhw", x, weight) * scale).flatten(2, 3),)


@torch.library.custom_op("flashtalk_rt::head_products", mutates_args=())
def _head_products(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """x [B, T, N, H, D] times each head's weight [H, D, W] and `scale` -> [B, T, N*H, W].

    One batched product that writes every head's rows straight to their place; einsum would copy them there.
    """
    batch, frames, keys, heads, _ = x.shape
    # Not a view of what is written: autograd lets no view that a custom op returns be added to.
    out = x.new_empty((batch, frames, keys * heads, weight.shape[-1]))
    by_head = out.view(-1, heads, weight.shape[-1]).transpose(0, 1)
    torch.baddbmm(by_head, x.flatten(0, 2).transpose(0, 1), weight, beta=0, alpha=scale, out=by_head)
    return out


@_head_products.register_fake
def _(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    batch, frames, keys, heads, _ = x.shape
    return x.new_empty((batch, frames, keys * heads, weight.shape[-1]))


differentiate_through(_head_products, _plain_products)


def absorb_audio(
    q_weight: Tensor, q_bias: Tensor, k: Tensor, v: Tensor, o_weight: Tensor, o_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold the query and output projections into a chunk's audio keys and values.

    q_weight, o_weight [C, C] (out, in) and q_bias, o_bias [C] as nn.Linear has them; k, v [B, T, N, H, D]
    with C = H D; one dtype.  Returns (A [B, T, C, N*H], a_bias [B, T, N*H], B [B, T, N*H, C]) in that dtype,
    A and a_bias scaled by D^-0.5; sums are float32.  Column n*H + h is key n of head h: in that order no
    matrix is copied between the products (A is stored transposed).  ValueError where the shapes do not
    belong together.
    """
    heads, dim = k.shape[3:]
    width = heads * dim
    if not (q_weight.shape == o_weight.shape == (width, width)) or k.shape != v.shape:
        raise ValueError(
            f"keys {[*k.shape]} and values {[*v.shape]} do not fit "
            f"the weights {[*q_weight.shape]} and {[*o_weight.shape]}"
        )
    scale = dim**-0.5
    a: Tensor = _head_products(k, q_weight.view(heads, dim, width), scale)
    a_bias: Tensor = _head_products(k, q_bias.view(heads, dim, 1), scale)
    b: Tensor = _head_products(v, o_weight.view(width, heads, dim).permute(1, 2, 0), 1.0)
    # Not o_bias / H in every row: that would round, read and write all of B once more.
    b[:, :, ::heads] += o_bias
    return a.mT, a_bias.squeeze(-1), b


def absorbed_audio_attention(
    x: Tensor,
    A: Tensor,
    a_bias: Tensor,
    B: Tensor,
    num_heads: int,
    keys: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """The whole audio cross-attention, projections included, from the matrices of `absorb_audio`.

    x [Bt, T*S, C] with S tokens a latent frame; A [Bt, T, C, N*H]; a_bias [Bt, T, N*H]; B [Bt, T, N*H, C];
    H = num_heads, N = keys; one dtype, in which scores and weights are stored between the products; the
    softmax is float32.  Returns [Bt, T*S, C] in x's dtype.  ValueError where the shapes do not belong
    together.
    """
    batch, tokens, width = x.shape
    frames = A.shape[1]
    if A.shape != (batch, frames, width, keys * num_heads) or B.shape != A.mT.shape or tokens % frames:
        raise ValueError(
            f"A {[*A.shape]} and B {[*B.shape]} do not fit x {[*x.shape]}, {num_heads} heads, {keys} keys"
        )
    scores = torch.bmm(x.reshape(batch * frames, -1, width), A.flatten(0, 1))
    bias = a_bias.flatten(0, 1)
    if backend_for(ABSORBED_SPEC, x.device, x.dtype, wanted=backend) == "triton":
        weights: Tensor = _softmax(scores, bias.contiguous(), keys)
    else:
        (weights,) = _plain_softmax(scores, bias, keys)
    return torch.bmm(weights, B.flatten(0, 1)).reshape(x.shape)


# --- which form --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AudioWork:
    """One layer's audio cross-attention in one denoising step, with its two projections."""

    tokens: int  # of all batch * T frames, S each
    frames: int  # batch * T
    keys: int  # N, a frame
    heads: int
    width: int  # C

    @property
    def plain_flops(self) -> float:
        """Two C x C projections a token, and attention to its frame's keys."""
        return 4 * self.tokens * self.width * (self.width + self.keys)

    @property
    def absorbed_flops(self) -> float:
        """Two C x (N H) products a token, and making A and B anew: N x C x C twice a frame."""
        construction = 4 * self.frames * self.keys * self.width**2
        return 4 * self.tokens * self.width * self.keys * self.heads + construction


# Measured (plain, absorbed) milliseconds, in bfloat16 on one H100 80GB (2026-11-24).  FLOPs decide elsewhere.
MEASURED_MS: Mapping[AudioWork, tuple[float, float]] = MappingProxyType(
    {AudioWork(tokens=12096, frames=9, keys=32, heads=40, width=5120): (1.72, 0.65)}
)


def audio_form(work: AudioWork) -> Literal["plain", "absorbed"]:
    """The cheaper form, for inference: by measurement where there is one, else by FLOPs.

    At 768 x 448 (12,096 tokens, 9 frames, 32 keys, 40 heads, width 5120): 1.28 TFLOP plain, 0.35 absorbed.
    """
    plain, absorbed = MEASURED_MS.get(work, (work.plain_flops, work.absorbed_flops))
    return "absorbed" if absorbed < plain else "plain"


# --- registry ----------------------------------------------------------------------------------------


def _case(batch: int, frames: int, tokens: int, keys: int, heads: int, dim: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int) -> Tensor:
            return torch.randn((batch, *shape, heads, dim), generator=generator, device=device).to(dtype)

        return {"q": normal(frames * tokens), "k": normal(frames, keys), "v": normal(frames, keys)}

    return Case(f"{batch}x{frames}x{tokens} keys {keys} heads {heads}x{dim}", make)


def _absorbed_case(batch: int, frames: int, tokens: int, keys: int, heads: int, width: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

        columns = keys * heads
        return {
            "x": normal(batch, frames * tokens, width),
            "A": normal(batch, frames, columns, width, scale=width**-0.5).mT,
            "a_bias": normal(batch, frames, columns),
            "B": normal(batch, frames, columns, width, scale=heads**-0.5),
            "num_heads": heads,
            "keys": keys,
        }

    return Case(f"{batch}x{frames}x{tokens} keys {keys} heads {heads} width {width}", make)


SPEC = OpSpec(
    "audio_cross_attention",
    (TRITON_HEADS, TORCH),
    function=audio_cross_attention,
    reference=reference.audio_cross_attention,
    cases=(
        _case(2, 3, 1, 5, 2, 16),
        _case(1, 2, 7, 32, 3, 64),
        _case(1, 1, 84, 33, 1, 128),
    ),
    workload=_case(1, 9, 1344, 32, 40, 128),
    flop=_flop.audio_cross_attention,
    gradients=("q", "k", "v"),
)
ABSORBED_SPEC = OpSpec(
    "absorbed_audio_attention",
    (TRITON, TORCH),
    function=absorbed_audio_attention,
    # Torch's form is the plain meaning; tests/test_cross_attention.py holds it to the plain op.
    reference=lambda **arguments: absorbed_audio_attention(**arguments, backend="torch"),
    cases=(
        _absorbed_case(2, 3, 1, 5, 3, 24),
        _absorbed_case(1, 2, 7, 32, 4, 16),
        _absorbed_case(1, 1, 84, 1, 1, 7),
    ),
    workload=_absorbed_case(1, 9, 1344, 32, 40, 5120),
    flop=_flop.absorbed_audio_attention,
    gradients=("x", "A", "a_bias", "B"),
)

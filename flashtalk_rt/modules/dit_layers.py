"""The layers of the diffusion transformer; parameter names are the published checkpoint's."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import DiTConfig
from ..ops import Quantized
from ..profiles import nvtx
from .linear import Fused, Linear

KeysValues = tuple[Tensor, Tensor]


class Norm(NamedTuple):
    """A LayerNorm of the residual stream: weight and bias [D] or [B, 1, D], and whether to emit float8."""

    weight: Tensor
    bias: Tensor
    fp8: bool

    @classmethod
    def modulated(cls, modulation: Tensor, fp8: bool) -> Norm:
        """From the first two vectors, shift and 1 + scale, of a modulation [B, 2 or 6, D] float32."""
        return cls(modulation[:, 1:2], modulation[:, 0:1], fp8)


class Modulations(NamedTuple):
    """What the noise level does to the norms and gates: constant over a denoising step."""

    layers: list[Tensor]  # [B, 6, D] float32 a block: shift, 1 + scale and gate, for attention and the FFN
    head: Tensor  # [B, 2, D] float32: shift and 1 + scale


class StepConstants(NamedTuple):
    """What of a denoising step depends on the noise level and the latent's size alone."""

    table: Tensor  # [L, head_dim / 2, 2] float32: `DiT.positions`
    modulations: Modulations


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """One layer's constant keys and values, each [B, tokens, H, D], and the text keys' score bias."""

    text: KeysValues
    image: KeysValues
    text_bias: Tensor  # [text tokens] float32: see `DiT.context`


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, [..., dim]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Parameters of an affine LayerNorm; `ops.residual_norm` computes it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


class SelfAttention(nn.Module):
    """Attention with rotary positions, of all tokens or by chunks; q and k are normalised in full width."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.eight_bit = False  # attention, in inference
        self._fused: Fused | None = None

    def fuse(self) -> bool:
        """Compute q, k and v as one product from now on: see `Fused`.  Whether they were not already."""
        if self._fused is not None and self._fused.holds(self.q):
            return False
        self._fused = Fused(self.q, self.k, self.v)
        return True

    @nvtx.range("dit/self_attention")
    def forward(self, x: Tensor | Quantized, table: Tensor, chunk_tokens: int | None) -> Tensor:
        """x [B, L, dim], table [L, D / 2, 2] from `ops.rope_table`, chunk_tokens as in `ops.chunk_attention`
        -> [B, L, dim].  ValueError for chunks where `eight_bit`."""
        q, k, v = (self.q(x), self.k(x), self.v(x)) if self._fused is None else self._fused(x)
        q = ops.qk_norm_rope(q, self.norm_q.weight, table, self.num_heads, self.eps)
        k = ops.qk_norm_rope(k, self.norm_k.weight, table, self.num_heads, self.eps)
        v = v.unflatten(-1, (self.num_heads, -1))
        if not self.eight_bit:
            attended = ops.chunk_attention(q, k, v, chunk_tokens)
        elif chunk_tokens is None:
            attended = ops.quantized_attention(q, k, v)
        else:
            raise ValueError("attention in eight bits knows no chunks; prepare the DiT without")
        return self.o(attended.flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Text and image: one query, two softmaxes, summed before the output projection."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.k_img, self.v_img = Linear(dim, dim), Linear(dim, dim)
        self.norm_k_img = RMSNorm(dim, eps)

    def context(self, text: Tensor, image: Tensor, text_bias: Tensor) -> LayerContext:
        """text and image tokens [B, *, dim] -> this layer's keys and values."""
        heads = (self.num_heads, -1)
        return LayerContext(
            (self.norm_k(self.k(text)).unflatten(-1, heads), self.v(text).unflatten(-1, heads)),
            (self.norm_k_img(self.k_img(image)).unflatten(-1, heads), self.v_img(image).unflatten(-1, heads)),
            text_bias,
        )

    @nvtx.range("dit/cross_attention")
    def forward(self, x: Tensor | Quantized, context: LayerContext) -> Tensor:
        """x [B, L, dim] -> [B, L, dim]."""
        q = ops.qk_norm_rope(self.q(x), self.norm_q.weight, None, self.num_heads, self.eps)
        out = ops.dual_cross_attention(q, *context.text, *context.image, text_bias=context.text_bias)
        return self.o(out.flatten(2))  # type: ignore[no-any-return]


class AudioCrossAttention(nn.Module):
    """Each latent frame's tokens against that frame's audio tokens; biases, no norm."""

    def __init__(self, dim: int, audio_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(audio_dim, 2 * dim)

    def context(self, audio: Tensor) -> KeysValues:
        """audio tokens [B, T, N, C] -> keys and values [B, T, N, H, D]."""
        k, v = self.kv_linear(audio).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return k.contiguous(), v.contiguous()  # once, not in every step

    @nvtx.range("dit/audio_cross_attention")
    def forward(self, x: Tensor, audio: KeysValues) -> Tensor:
        """x [B, T S, dim], S tokens a latent frame; audio from `context` -> [B, T S, dim]."""
        if x.is_cuda and not torch.is_grad_enabled() and not ops.plainly():
            frames, keys = audio[0].shape[1:3]
            work = ops.AudioWork(
                x.shape[0] * x.shape[1], x.shape[0] * frames, keys, self.num_heads, x.shape[2]
            )
            if ops.audio_form(work) == "absorbed":
                q, out = self.q_linear, self.proj
                folded = ops.absorb_audio(q.weight, q.bias, *audio, out.weight, out.bias)
                return ops.absorbed_audio_attention(x, *folded, self.num_heads, keys)
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1))
        return self.proj(ops.audio_cross_attention(q, *audio).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Sequential):
    """Linear, tanh GELU, linear; the published names are a sequence's."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(Linear(dim, hidden), nn.GELU(approximate="tanh"), Linear(hidden, dim))

    @nvtx.range("dit/ffn")
    def forward(self, x: Tensor | Quantized) -> Tensor:
        up, _, down = self
        assert isinstance(up, Linear)
        return down(ops.quantize(up(x), gelu=True) if down.fp8 else up.gelu(x))  # type: ignore[no-any-return]


class ImageEmbedding(nn.Module):
    """Image tokens [B, tokens, image_dim] -> [B, tokens, dim]."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)  # type: ignore[no-any-return]


class AudioProjection(nn.Module):
    """Windows of audio features to `context_tokens` tokens a latent frame.

    The first video frame is a latent frame of its own; every later group of four gives the left
    half-window of its first frame, the centres of the middle two and the right half-window of its
    last, so that no feature is seen twice.
    """

    GROUP = 4  # video frames a latent frame: the VAE's stride in time

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.tokens, self.width = config.context_tokens, config.output_dim
        feature = config.audio_blocks * config.audio_dim
        grouped = config.audio_window + self.GROUP - 1
        self.proj1 = nn.Linear(config.audio_window * feature, config.intermediate_dim)
        self.proj1_vf = nn.Linear(grouped * feature, config.intermediate_dim)
        self.proj2 = nn.Linear(config.intermediate_dim, config.intermediate_dim)
        self.proj3 = nn.Linear(config.intermediate_dim, config.context_tokens * config.output_dim)
        self.norm = nn.LayerNorm(config.output_dim)

    def forward(self, audio: Tensor) -> Tensor:
        """audio [B, F, window, blocks, C] with F = 1 + 4 n -> [B, 1 + n, tokens, output_dim]."""
        first = audio[:, :1].flatten(2)
        later = audio[:, 1:].unflatten(1, (-1, self.GROUP))
        middle = audio.shape[2] // 2
        grouped = torch.cat(
            (
                later[:, :, 0, : middle + 1],
                later[:, :, 1:-1, middle],
                later[:, :, -1, middle:],
            ),
            dim=2,
        ).flatten(2)
        hidden = torch.cat((F.relu(self.proj1(first)), F.relu(self.proj1_vf(grouped))), dim=1)
        tokens = self.proj3(F.relu(self.proj2(hidden)))
        return self.norm(tokens.unflatten(-1, (self.tokens, self.width)))  # type: ignore[no-any-return]

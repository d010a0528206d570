"""The diffusion transformer: WAN2.1 image-to-video with an audio branch.

Parameter names are the published checkpoint's.  What does not depend on the noisy latent (text,
image and audio keys and values) is computed by `context` and `audio_context`, so that a caller
computes it once a session or once a chunk instead of once a step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import DiTConfig

KeysValues = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """One layer's constant keys and values, each [B, tokens, H, D]."""

    text: KeysValues
    image: KeysValues


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x: Tensor, table: Tensor, chunk_tokens: int | None) -> Tensor:
        q = ops.qk_norm_rope(self.q(x), self.norm_q.weight, table, self.num_heads, self.eps)
        k = ops.qk_norm_rope(self.k(x), self.norm_k.weight, table, self.num_heads, self.eps)
        v = self.v(x).unflatten(-1, (self.num_heads, -1))
        return self.o(ops.chunk_attention(q, k, v, chunk_tokens).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Text and image: one query, two softmaxes, summed before the output projection."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_k_img = RMSNorm(dim, eps)

    def context(self, text: Tensor, image: Tensor) -> LayerContext:
        """text and image tokens [B, *, dim] -> this layer's keys and values."""
        heads = (self.num_heads, -1)
        return LayerContext(
            (self.norm_k(self.k(text)).unflatten(-1, heads), self.v(text).unflatten(-1, heads)),
            (self.norm_k_img(self.k_img(image)).unflatten(-1, heads), self.v_img(image).unflatten(-1, heads)),
        )

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        return self.o(ops.dual_cross_attention(q, *context.text, *context.image).flatten(2))  # type: ignore[no-any-return]


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
        return k, v

    def forward(self, x: Tensor, audio: KeysValues) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1))
        return self.proj(ops.audio_cross_attention(q, *audio).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = SelfAttention(dim, heads, config.eps)
        self.norm3 = LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(dim, heads, config.eps)
        self.norm_x = LayerNorm(dim, config.eps)
        self.audio_cross_attn = AudioCrossAttention(dim, config.output_dim, heads)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        table: Tensor,
        context: LayerContext,
        audio: KeysValues,
        chunk_tokens: int | None,
    ) -> Tensor:
        """x [B, L, dim], time [B, 6, dim] float32 -> [B, L, dim]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).chunk(6, dim=1)
        y = self.self_attn(ops.adaln(x, shift1, scale1, self.eps), table, chunk_tokens)
        x = ops.gate_residual(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x), context)
        x = x + self.audio_cross_attn(self.norm_x(x), audio)
        return ops.gate_residual(x, self.ffn(ops.adaln(x, shift2, scale2, self.eps)), gate2)


class Head(nn.Module):
    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.head = nn.Linear(dim, out_features)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, dim], time embedding [B, dim] float32."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        return self.head(ops.adaln(x, shift, scale, self.eps))  # type: ignore[no-any-return]


class ImageEmbedding(nn.Module):
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


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep: t [B] in 0..1000 -> [B, dim] float32, cosines first."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angle = t.double()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


class DiT(nn.Module):
    """Velocity of a noisy latent chunk, given text, image and audio.

    `chunk_frames` in `forward` makes attention causal between chunks of that many latent frames;
    without it the whole latent is one chunk.
    """

    PATCH = (1, 2, 2)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, self.PATCH, stride=self.PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(dim, config.out_dim * math.prod(self.PATCH), config.eps)
        self.img_emb = ImageEmbedding(config.image_dim, dim)
        self.audio_proj = AudioProjection(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def context(self, text: Tensor, image: Tensor) -> list[LayerContext]:
        """Every layer's text and image keys and values: constant over a session.

        text [B, L, text_dim], L <= text_len, zero-padded here: the padded tokens take part (the
        published model has no mask).  image [B, tokens, image_dim].
        """
        padded = F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1]))
        text_tokens = self.text_embedding(padded.to(self.dtype))
        image_tokens = self.img_emb(image.to(self.dtype))
        return [block.cross_attn.context(text_tokens, image_tokens) for block in self._blocks()]

    def audio_context(self, audio: Tensor) -> list[KeysValues]:
        """Every layer's audio keys and values: constant over a chunk's denoising steps.

        audio [B, F, window, blocks, audio_dim], F video frames = 1 + 4 n.
        """
        tokens = self.audio_proj(audio.to(self.dtype))
        return [block.audio_cross_attn.context(tokens) for block in self._blocks()]

    def forward(
        self,
        latent: Tensor,
        t: Tensor,
        y: Tensor,
        context: Sequence[LayerContext],
        audio: Sequence[KeysValues],
        chunk_frames: int | None = None,
    ) -> Tensor:
        """Predict the velocity (noise - clean).

        latent [B, 16, T, H, W] noisy, motion frames clean; t [B] in 0..1000; y [B, 20, T, H, W]
        (mask and reference latent); `context` and `audio` from the methods of those names;
        `chunk_frames`: latent frames a chunk, or None.  H and W even.  Returns [B, 16, T, H, W].
        """
        x = self.patch_embedding(torch.cat((latent, y), dim=1).to(self.dtype))
        grid = (x.shape[2], x.shape[3], x.shape[4])
        # Under autocast the residual stream stays in the parameters' precision.
        x = x.flatten(2).transpose(1, 2).to(self.dtype)
        # The table costs microseconds beside one block; holding it would be state to invalidate.
        table = ops.rope_table(grid, self.config.head_dim, x.device)
        embedding = self.time_embedding(time_features(t, self.config.freq_dim).to(self.dtype))
        time = self.time_projection(embedding).float().unflatten(1, (6, -1))
        chunk_tokens = None if chunk_frames is None else chunk_frames * grid[1] * grid[2]
        for block, layer_context, layer_audio in zip(self._blocks(), context, audio, strict=True):
            x = block(x, time, table, layer_context, layer_audio, chunk_tokens)
        return self._unpatchify(self.head(x, embedding.float()), grid)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        batch, channels = x.shape[0], self.config.out_dim
        x = x.view(batch, *grid, *self.PATCH, channels)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        size = [n * p for n, p in zip(grid, self.PATCH, strict=True)]
        return x.reshape(batch, channels, *size)

"""The diffusion transformer: WAN2.1 image-to-video with an audio branch.

Parameter names are the published checkpoint's.  What does not depend on the noisy latent (text,
image and audio keys and values) is computed by `context` and `audio_context`, so that a caller
computes it once a session or once a chunk instead of once a step; what depends on the noise level and
the size alone, by `step_constants`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import DiTConfig
from ..ops import Quantized
from ..profiles import nvtx
from .dit_layers import (
    AudioCrossAttention,
    AudioProjection,
    CrossAttention,
    FeedForward,
    ImageEmbedding,
    KeysValues,
    LayerContext,
    LayerNorm,
    Modulations,
    Norm,
    SelfAttention,
    StepConstants,
)
from .linear import Linear


class Block(nn.Module):
    """Self-attention, cross-attention, audio cross-attention and feed-forward on one residual stream.

    A block takes the stream already normalised for its first layer and returns it normalised for what
    comes after, so that adding to the stream and normalising it is one pass over it, everywhere.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = SelfAttention(dim, heads, config.eps)
        self.norm3 = LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, heads, config.eps)
        self.norm_x = LayerNorm(dim)
        self.audio_cross_attn = AudioCrossAttention(dim, config.output_dim, heads)
        self.ffn = FeedForward(dim, config.ffn_dim)

    @property
    def fp8(self) -> bool:
        """Whether its large projections are float8."""
        return self.self_attn.q.fp8

    def large_projections(self) -> list[Linear]:
        """Those that may be float8: also the keys and values of text and image, which a session computes
        once, as they are 8 GB at the published size in bfloat16."""
        return [layer for layer in self.modules() if isinstance(layer, Linear)]

    def quantize(self) -> None:
        """Have the large projections hold float8, all of it made before any old weight is let go of: none of
        it then lies in old weights' memory."""
        layers = self.large_projections()
        weights = [ops.quantize(layer.weight) for layer in layers]
        for layer, weight in zip(layers, weights, strict=True):
            layer.hold(weight)

    @nvtx.range("dit/block")  # its norms, and the groups below
    def forward(
        self,
        x: Tensor,
        normed: Tensor | Quantized,
        modulation: Tensor,
        after: Norm,
        table: Tensor,
        context: LayerContext,
        audio: KeysValues,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor | Quantized]:
        """x [B, L, dim]; normed: x through the norm of the modulation [B, 6, dim] (see `Modulations`); after:
        the norm that follows the block -> the new x, and it through `after`."""
        _, _, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        y = self.self_attn(normed, table, chunk_tokens)
        x, normed = ops.residual_norm(x, y, gate1, self.norm3.weight, self.norm3.bias, self.eps, fp8=self.fp8)
        y = self.cross_attn(normed, context)
        x, heard = ops.residual_norm(x, y, None, self.norm_x.weight, self.norm_x.bias, self.eps)
        y = self.audio_cross_attn(heard, audio)
        x, normed = ops.residual_norm(x, y, None, scale2, shift2, self.eps, fp8=self.fp8)
        return ops.residual_norm(
            x, self.ffn(normed), gate2, after.weight, after.bias, self.eps, fp8=after.fp8
        )


class Head(nn.Module):
    """The last modulated norm's parameters and the projection to patches."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.head = nn.Linear(dim, out_features)


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
        self.head = Head(dim, config.out_dim * math.prod(self.PATCH))
        self.img_emb = ImageEmbedding(config.image_dim, dim)
        self.audio_proj = AudioProjection(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def fp8(self) -> bool:
        """Whether the large projections are float8."""
        return self._blocks()[0].fp8

    def large_projections(self) -> list[Linear]:
        """Every block's."""
        return [layer for block in self._blocks() for layer in block.large_projections()]

    @property
    def eight_bit_attention(self) -> bool:
        """Whether self-attention computes in eight bits."""
        return self._blocks()[0].self_attn.eight_bit

    def prepare(
        self,
        dtype: torch.dtype,
        *,
        fp8: bool,
        eight_bit_attention: bool = False,
        release: Callable[[], object] = lambda: None,
    ) -> None:
        """Make the weights ready for inference, in place, where they will be used: in `dtype`, the large
        projections in float8 where `fp8` asks for it (there is no way back), and one matrix for each
        block's q, k and v; and have self-attention compute in eight bits or not.  ValueError: float8 without
        bfloat16, what its products return.

        release: called when a block's large weights were let go of, to return their memory to the device.
        Without, new weights lie in parts of old ones' memory, and the rest is of no use: 3.8 GB at the
        published size.
        """
        if fp8 and dtype != torch.bfloat16:
            raise ValueError(f"float8 goes with bfloat16, not with {dtype}")
        for module in self.modules():
            if isinstance(module, Linear):
                module.cast(dtype)
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        self.eval().requires_grad_(False)
        for block in self._blocks():
            if fp8 and not block.fp8:
                block.quantize()
                release()
            if block.self_attn.fuse():
                release()
            block.self_attn.eight_bit = eight_bit_attention

    def context(self, text: Tensor, image: Tensor) -> list[LayerContext]:
        """Every layer's text and image keys and values: constant over a session.

        text [B, L, text_dim], L <= text_len, zero-padded here: the padded tokens take part (the
        published model has no mask), one of them for all (`ops.padding_bias`).
        image [B, tokens, image_dim].
        """
        real, length = text.shape[1], self.config.text_len
        bias = ops.padding_bias(real, length, text.device)
        padded = F.pad(text, (0, 0, 0, length - real))
        text_tokens = self.text_embedding(padded.to(self.dtype))
        image_tokens = self.img_emb(image.to(self.dtype))
        return [block.cross_attn.context(text_tokens, image_tokens, bias) for block in self._blocks()]

    def audio_context(self, audio: Tensor) -> list[KeysValues]:
        """Every layer's audio keys and values: constant over a chunk's denoising steps.

        audio [B, F, window, blocks, audio_dim], F video frames = 1 + 4 n.
        """
        tokens = self.audio_proj(audio.to(self.dtype))
        return [block.audio_cross_attn.context(tokens) for block in self._blocks()]

    def positions(self, size: Sequence[int]) -> Tensor:
        """The rotary table of a latent [T, H, W], H and W even: [T * H * W / 4, head_dim / 2, 2] float32."""
        frames, height, width = (n // p for n, p in zip(size, self.PATCH, strict=True))
        device = self.patch_embedding.weight.device
        return ops.rope_table((frames, height, width), self.config.head_dim, device)

    def modulations(self, t: Tensor) -> Modulations:
        """Every layer's at noise level t [B] in 0..1000: 5 MB at the published size and B = 1."""
        embedding = self.time_embedding(time_features(t, self.config.freq_dim).to(self.dtype))
        time = self.time_projection(embedding).float().unflatten(1, (6, -1))
        layers = []
        for block in self._blocks():
            shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation.float() + time).chunk(6, dim=1)
            layers.append(torch.cat((shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2), dim=1))
        shift, scale = (self.head.modulation.float() + embedding.float()[:, None]).chunk(2, dim=1)
        return Modulations(layers, torch.cat((shift, 1 + scale), dim=1))

    def step_constants(self, t: Tensor, size: Sequence[int]) -> StepConstants:
        """What `forward` takes in the place of t [B], for latents [B, 16, *size], as long as no weight
        changes."""
        return StepConstants(self.positions(size), self.modulations(t))

    def forward(
        self,
        latent: Tensor,
        t: Tensor | StepConstants,
        y: Tensor,
        context: Sequence[LayerContext],
        audio: Sequence[KeysValues],
        chunk_frames: int | None = None,
    ) -> Tensor:
        """Predict the velocity (noise - clean).

        latent [B, 16, T, H, W] noisy, motion frames clean; t [B] in 0..1000, or what `step_constants` made of
        it; y [B, 20, T, H, W] (mask and reference latent); `context` and `audio` from the methods of those
        names; `chunk_frames`: latent frames a chunk, or None.  H and W even.  Returns [B, 16, T, H, W].
        """
        step = self.step_constants(t, latent.shape[2:]) if isinstance(t, Tensor) else t
        frames = torch.cat((latent, y), dim=1).to(self.dtype).transpose(1, 2)
        patches = F.pixel_unshuffle(frames, self.PATCH[-1]).movedim(2, -1)
        grid = (patches.shape[1], patches.shape[2], patches.shape[3])
        # A convolution that steps by its own size is a product, and the product leaves contiguous tokens.
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        # Under autocast the residual stream stays in the parameters' precision.
        x = F.linear(patches.flatten(1, 3), weight, bias).to(self.dtype)
        chunk_tokens = None if chunk_frames is None else chunk_frames * grid[1] * grid[2]
        blocks, modulations = self._blocks(), step.modulations.layers
        norms = [
            Norm.modulated(modulation, block.fp8)
            for block, modulation in zip(blocks, modulations, strict=True)
        ]
        norms.append(Norm.modulated(step.modulations.head, fp8=False))
        first = norms[0]
        x, normed = ops.residual_norm(x, None, None, first.weight, first.bias, self.config.eps, fp8=first.fp8)
        for block, modulation, after, *layer in zip(
            blocks, modulations, norms[1:], context, audio, strict=True
        ):
            x, normed = block(x, normed, modulation, after, step.table, *layer, chunk_tokens)
        return self._unpatchify(self.head.head(normed), grid)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        batch, channels = x.shape[0], self.config.out_dim
        x = x.view(batch, *grid, *self.PATCH, channels)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        size = [n * p for n, p in zip(grid, self.PATCH, strict=True)]
        return x.reshape(batch, channels, *size)

"""How much arithmetic the networks ask for: every product, attention and convolution, from the configs alone.

Counted is the published work, in the published form, unless a caller asks for the form that the runtime
takes: audio cross-attention with its projections absorbed (`dit_audio_linears`), upsampling folded into
convolutions of the small picture (`vae_decode`).  A multiplication and an addition are two operations.  What
is left out is below one percent: norms, rotations, softmax, modulation, patch embedding, time projections,
and what is constant over a session or a chunk (keys and values of text, image and audio).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Literal

from ..config import DiTConfig, StreamConfig, VAEConfig

# Whether each of the VAE's three scale changes also halves the frame rate, in the encoder's order.
TEMPORAL = (False, True, True)


@dataclasses.dataclass(frozen=True)
class Gemm:
    """[m, k] x [k, n], `batch` times with other matrices."""

    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def flop(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention, unmasked: `batch` times `heads` heads."""

    heads: int
    queries: int
    keys: int
    head_dim: int
    batch: int = 1

    @property
    def flop(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution to [out_dim, frames, height, width]; its input has what a causal cache adds in time and
    zero padding in space."""

    in_dim: int
    out_dim: int
    kernel: tuple[int, int, int]
    frames: int
    height: int
    width: int
    stride: tuple[int, int, int] = (1, 1, 1)

    @property
    def flop(self) -> int:
        taps = self.kernel[0] * self.kernel[1] * self.kernel[2]
        return 2 * self.in_dim * self.out_dim * taps * self.frames * self.height * self.width


Work = Gemm | Attention | Convolution
AudioForm = Literal["plain", "absorbed"]  # as `ops.audio_form` chooses


def total_flop(work: Iterable[Work]) -> int:
    return sum(item.flop for item in work)


def tokens(stream: StreamConfig) -> int:
    """Of one chunk: latent frames times a quarter of the latent pixels."""
    return stream.latent_frames * (stream.height // 16) * (stream.width // 16)


def dit_linears(config: DiTConfig, stream: StreamConfig) -> list[Work]:
    """All linear layers of one denoising step as published."""
    return dit_main_linears(config, stream) + dit_audio_linears(config, stream, "plain")


def dit_main_linears(config: DiTConfig, stream: StreamConfig) -> list[Work]:
    """The linear layers of one denoising step but for the audio's: the products that fp8 runs in float8.
    Query, key and value of self-attention are one product."""
    count, dim = tokens(stream), config.dim
    layer: list[Work] = [
        Gemm(count, dim, 3 * dim),
        *[Gemm(count, dim, dim)] * 3,  # self out; cross query and out
        Gemm(count, dim, config.ffn_dim),
        Gemm(count, config.ffn_dim, dim),
    ]
    return layer * config.num_layers


def dit_audio_linears(config: DiTConfig, stream: StreamConfig, form: AudioForm) -> list[Work]:
    """The products of one denoising step's audio cross-attention.  plain: the query and output projections.
    absorbed: making A and B, head by head, then each frame's scores and sums, which leaves no attention."""
    count, dim, frames = tokens(stream), config.dim, stream.latent_frames
    if form == "plain":
        layer: list[Work] = [Gemm(count, dim, dim)] * 2
    else:
        keys = config.context_tokens
        columns = keys * config.num_heads
        layer = [
            *[Gemm(frames * keys, config.head_dim, dim, batch=config.num_heads)] * 2,
            Gemm(count // frames, dim, columns, batch=frames),
            Gemm(count // frames, columns, dim, batch=frames),
        ]
    return layer * config.num_layers


def dit_self_attention(config: DiTConfig, stream: StreamConfig) -> list[Work]:
    count = tokens(stream)
    return [Attention(config.num_heads, count, count, config.head_dim)] * config.num_layers


def dit_dual_attention(
    config: DiTConfig, stream: StreamConfig, text_tokens: int, image_tokens: int = 257
) -> list[Work]:
    """Cross-attention to text and image."""
    count = tokens(stream)
    layer: list[Work] = [
        Attention(config.num_heads, count, keys, config.head_dim) for keys in (text_tokens, image_tokens)
    ]
    return layer * config.num_layers


def dit_audio_attention(config: DiTConfig, stream: StreamConfig) -> list[Work]:
    """Each latent frame to its own audio, in the plain form."""
    frames = stream.latent_frames
    queries = tokens(stream) // frames
    return [
        Attention(config.num_heads, queries, config.context_tokens, config.head_dim, batch=frames)
    ] * config.num_layers


def dit_cross_attention(config: DiTConfig, stream: StreamConfig) -> list[Work]:
    """To text, all `text_len` keys, to image and to audio."""
    return dit_dual_attention(config, stream, config.text_len) + dit_audio_attention(config, stream)


def dit_step(config: DiTConfig, stream: StreamConfig) -> list[Work]:
    """One denoising step as published."""
    return (
        dit_linears(config, stream) + dit_self_attention(config, stream) + dit_cross_attention(config, stream)
    )


def _residual_block(in_dim: int, out_dim: int, frames: int, height: int, width: int) -> list[Work]:
    size = (frames, height, width)
    convs: list[Work] = [
        Convolution(in_dim, out_dim, (3, 3, 3), *size),
        Convolution(out_dim, out_dim, (3, 3, 3), *size),
    ]
    return convs if in_dim == out_dim else [*convs, Convolution(in_dim, out_dim, (1, 1, 1), *size)]


def _middle(dim: int, frames: int, height: int, width: int) -> list[Work]:
    pixels, size = height * width, (frames, height, width)
    return [
        *_residual_block(dim, dim, *size) * 2,
        Convolution(dim, 3 * dim, (1, 1, 1), *size),
        Convolution(dim, dim, (1, 1, 1), *size),
        Attention(1, pixels, pixels, dim, batch=frames),
    ]


def vae_decode_frame(
    config: VAEConfig, stream: StreamConfig, first: bool, folded: bool = False
) -> list[Work]:
    """Decoding one latent frame, the `first` of a video or a later one.  Upsampling is a convolution of the
    large picture; `folded`, four of the small one, 2.25 times less."""
    widths = tuple(reversed(config.dim_mult))
    dims = [config.dim * m for m in (widths[0], *widths)]
    frames, height, width = 1, stream.height // 8, stream.width // 8
    work: list[Work] = [Convolution(config.z_dim, dims[0], (3, 3, 3), frames, height, width)]
    work += _middle(dims[0], frames, height, width)
    for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
        start = in_dim // 2 if level else in_dim
        for block in range(config.num_res_blocks + 1):
            work += _residual_block(start if block == 0 else out_dim, out_dim, frames, height, width)
        if level == len(TEMPORAL):
            continue
        if TEMPORAL[-1 - level] and not first:
            work.append(Convolution(out_dim, 2 * out_dim, (3, 1, 1), frames, height, width))
            frames *= 2
        small, (height, width) = (height, width), (2 * height, 2 * width)
        if folded:
            work += [Convolution(out_dim, out_dim // 2, (1, 2, 2), frames, *small)] * 4
        else:
            work.append(Convolution(out_dim, out_dim // 2, (1, 3, 3), frames, height, width))
    return [*work, Convolution(dims[-1], 3, (3, 3, 3), frames, height, width)]


def vae_decode(config: VAEConfig, stream: StreamConfig, folded: bool = False) -> list[Work]:
    """Decoding a chunk; `folded`: see `vae_decode_frame`."""
    later = vae_decode_frame(config, stream, first=False, folded=folded)
    return vae_decode_frame(config, stream, first=True, folded=folded) + later * (stream.latent_frames - 1)


def _encode_step(config: VAEConfig, stream: StreamConfig, frames: int) -> list[Work]:
    """Encoding a video's first 1 + 4 n frames, or the 4 n of later latent frames, in one call."""
    dims = [config.dim * m for m in (1, *config.dim_mult)]
    height, width, first = stream.height, stream.width, frames % 4 == 1
    work: list[Work] = [Convolution(3, dims[0], (3, 3, 3), frames, height, width)]
    for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
        for block in range(config.num_res_blocks):
            work += _residual_block(in_dim if block == 0 else out_dim, out_dim, frames, height, width)
        if level == len(TEMPORAL):
            continue
        height, width = height // 2, width // 2
        work.append(Convolution(out_dim, out_dim, (1, 3, 3), frames, height, width, stride=(1, 2, 2)))
        if TEMPORAL[level] and frames > 1:
            # The first frame stands alone.
            frames //= 2
            work.append(Convolution(out_dim, out_dim, (3, 1, 1), frames, height, width, stride=(2, 1, 1)))
            frames += first
    work += _middle(dims[-1], frames, height, width)
    return [*work, Convolution(dims[-1], 2 * config.z_dim, (3, 3, 3), frames, height, width)]


def vae_encode(config: VAEConfig, stream: StreamConfig) -> list[Work]:
    """Encoding a chunk's last frames as the next one's motion: five frames in one call, then four a call."""
    first = min(5, stream.motion_frames)
    later = _encode_step(config, stream, 4) * ((stream.motion_frames - first) // 4)
    return _encode_step(config, stream, first) + later


def color_bytes(stream: StreamConfig) -> int:
    """The least that matching a chunk's colours moves: every pixel read for the statistics, read again and
    written, as float32, and written as uint8."""
    return stream.frames * stream.height * stream.width * 3 * (3 * 4 + 1)

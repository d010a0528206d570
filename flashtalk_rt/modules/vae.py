"""The WAN2.1 VAE: causal 3D convolutions, four frames a latent frame, with explicit caches.

Parameter names are the published checkpoint's.  A convolution looks two frames back; what it must
remember between calls is a tensor in a `Cache`, so encoding and decoding can go one latent frame
at a time with exactly the result of going all at once.
"""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..config import VAEConfig
from ..profiles import nvtx
from .vae_layers import (
    Cache,
    CacheCursor,
    CausalConv3d,
    Downsample,
    ResidualBlock,
    RMSNorm,
    RoomPlanner,
    SpatialAttention,
    Sum,
    Upsample,
    added,
    run,
    with_past,
)

__all__ = ["ENCODE_STEP", "STRIDE", "VAE", "Cache", "CacheCursor"]

ENCODE_STEP = 4  # frames a latent frame, but for a video's first, which holds one
STRIDE = 8  # pixels a latent pixel


def middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), SpatialAttention(dim), ResidualBlock(dim, dim))


_Head = tuple[RMSNorm, nn.SiLU, CausalConv3d]


def head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(dim), nn.SiLU(), CausalConv3d(dim, out_dim, 3))


# Whether each of the three scale changes also halves (or doubles) the frame rate.
TEMPORAL_DOWN = (False, True, True)


class Encoder(nn.Module):
    """Video to the moments of its latent, the next frames of it a call."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, dims[0], 3)
        layers: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            layers += [
                ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(config.num_res_blocks)
            ]
            if level < len(TEMPORAL_DOWN):
                layers.append(Downsample(out_dim, temporal=TEMPORAL_DOWN[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(dims[-1])
        self.head = head(dims[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, cursor: CacheCursor) -> Tensor:
        """x [B, 3, T, H, W]: T is 1 + 4 n at a video's start, any n from 0, else divisible by 4.

        -> [B, 2 z, 1 + n or T / 4, H / 8, W / 8], before `VAE.conv1`."""
        stream: Tensor | Sum = self.conv1(with_past(x, cursor))
        for layers in (self.downsamples, self.middle):
            stream = run(layers, stream, cursor)
        return self._moments(stream, cursor)

    @nvtx.range("vae/head")
    def _moments(self, stream: Tensor | Sum, cursor: CacheCursor) -> Tensor:
        norm, _, conv = cast(_Head, tuple(self.head))
        y = ops.norm_silu(added(stream), norm.gamma.flatten(), cursor.take())
        cursor.put(y[:, :, -2:])
        moments: Tensor = conv(y)
        return moments


class Decoder(nn.Module):
    """A latent behind `VAE.conv2` to video, the next latent frames of it a call."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = tuple(reversed(config.dim_mult))
        dims = [config.dim * m for m in (widths[0], *widths)]
        self.conv1 = CausalConv3d(config.z_dim, dims[0], 3)
        self.middle = middle(dims[0])
        layers: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            # An upsampling halves the channels, so all levels but the first start at half width.
            start = in_dim // 2 if level else in_dim
            layers += [
                ResidualBlock(start if i == 0 else out_dim, out_dim) for i in range(config.num_res_blocks + 1)
            ]
            if level < len(TEMPORAL_DOWN):
                layers.append(Upsample(out_dim, temporal=TEMPORAL_DOWN[-1 - level]))
        self.upsamples = nn.Sequential(*layers)
        self.head = head(dims[-1], 3)

    def forward(self, x: Tensor, cursor: CacheCursor, clamp: bool = False) -> Tensor:
        """x [B, z, t, h, w], t = 1 at a video's start -> [B, 3, 1 or 4 t, 8 h, 8 w], clamped to [-1, 1] if
        asked."""
        stream: Tensor | Sum = self.conv1(with_past(x, cursor))
        for layers in (self.middle, self.upsamples):
            stream = run(layers, stream, cursor)
        return self._frames(stream, cursor, clamp)

    @nvtx.range("vae/head")
    def _frames(self, stream: Tensor | Sum, cursor: CacheCursor, clamp: bool) -> Tensor:
        y, bias, shortcut = stream if isinstance(stream, Sum) else (stream, None, None)
        norm, _, conv = cast(_Head, tuple(self.head))
        past, room = cursor.take(), cursor.room(0)
        frames, future = ops.vae_head(
            y, bias, shortcut, norm.gamma.flatten(), past, conv.weight, conv.bias, clamp, future=room
        )
        cursor.put(future)
        return frames


class VAE(nn.Module):
    """Video [B, 3, 1 + 4 n, H, W] in [-1, 1] <-> normalised latent [B, z, 1 + n, H/8, W/8]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self._on_device: dict[torch.device, Tensor] = {}
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def channels_last(self) -> VAE:
        """Lay the convolution weights out channels-last, in place: the layout the activations have."""
        formats = {5: torch.channels_last_3d, 4: torch.channels_last}
        for parameter in self.parameters():
            if parameter.dim() in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
        return self

    def prepare(self) -> VAE:
        """Ready for inference, in place: channels-last weights, and upsampling folded into the convolutions
        behind it.  The weights must not change afterwards."""
        for module in self.modules():
            if isinstance(module, Upsample):
                module.fold()
        return self.channels_last()

    def encode(self, video: Tensor) -> Tensor:
        """The latent's mean, normalised.  video [B, 3, T, H, W], T = 1 + 4 n, H and W divisible by
        8, in [-1, 1].  Returns [B, z, 1 + n, H/8, W/8]."""
        mean, _ = self.encode_distribution(video)
        return self.normalize(mean)

    def encode_distribution(self, video: Tensor, step: int = ENCODE_STEP) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the unnormalised latent, each [B, z, 1 + n, H/8, W/8].

        `step`: frames at a time, a multiple of 4; the first time one more.  More is faster on a short clip
        and takes more memory; the result is the same.
        """
        frames, height, width = video.shape[2:]
        if frames % ENCODE_STEP != 1 or height % STRIDE or width % STRIDE:
            raise ValueError(
                f"cannot encode {frames} frames of {height} x {width}: "
                "frames must be 1 + 4 n, sides divisible by 8"
            )
        # Every convolution then runs NDHWC, which cuDNN and oneDNN both prefer.
        video = video.to(self.dtype, memory_format=torch.channels_last_3d)
        cache: Cache | None = None
        parts = []
        # The first frame alone would not fill a large GPU, so it takes the next ones with it.
        for start in (0, *range(1 + step, frames, step)):
            end = start + step if start else 1 + step
            # The futures are views of the convolutions' inputs: 2 GB of 4 frames at 768 x 448, beside as much
            # of the frames before.  Gradients need the inputs anyway.
            cursor = CacheCursor(cache, keep=end < frames, copy=not torch.is_grad_enabled())
            parts.append(self.encoder(video[:, :, start:end], cursor))
            cache = cursor.future
        mean, logvar = self.conv1(torch.cat(parts, dim=2)).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor, step: int = 1) -> Tensor:
        """The video of a normalised latent [B, z, 1 + n, h, w] -> [B, 3, 1 + 4 n, 8 h, 8 w], in
        about [-1, 1] (not clamped).  `step`: latent frames at a time after the first."""
        cache: Cache | None = None
        parts = []
        for start in (0, *range(1, latent.shape[2], step)):
            end = start + step if start else 1
            frames, cache = self.decode_step(latent[:, :, start:end], cache)
            parts.append(frames)
        return torch.cat(parts, dim=2)

    def decode_step(
        self, latent: Tensor, cache: Cache | None, clamp: bool = False, rooms: list[Tensor] | None = None
    ) -> tuple[Tensor, Cache]:
        """Decode the next latent frames of a video.

        latent [B, z, t, h, w], normalised, t = 1 when `cache` is None (the start); -> the frames
        (1 at the start, else 4 t), in about [-1, 1] unless `clamp`, and the cache for the next call.

        rooms: allocated as `decoding_rooms` says; what must be remembered is then written there and nowhere
        else: `cache` may be, and what is returned is, `remembered(rooms)`, and nothing is copied.
        """
        if cache is None and latent.shape[2] != 1:
            raise ValueError(f"the first decode step takes one latent frame, not {latent.shape[2]}")
        mean, std = self._statistics(latent)
        z = self.conv2((latent.float() * std + mean).to(self.dtype, memory_format=torch.channels_last_3d))
        cursor = CacheCursor(cache, rooms)
        return self.decoder(z, cursor, clamp), cursor.future

    def decoding_rooms(self, latent: Tensor) -> list[Tensor]:
        """What to allocate as rooms for `decode_step` of latents like this one, at the start and later: on
        the meta device, a tensor for the input of each convolution, which every step makes again in place."""
        _, cache = self.decode_step(latent[:, :, :1], None)
        planner = RoomPlanner(cache)
        self.decoder(latent.to(self.dtype, memory_format=torch.channels_last_3d), planner)
        return planner.rooms

    @staticmethod
    def remembered(rooms: list[Tensor]) -> Cache:
        """The cache that lies in rooms which were decoded into."""
        return [room[:, :, -2:] for room in rooms]

    def normalize(self, mean: Tensor) -> Tensor:
        """Unnormalised latent -> zero mean, unit variance by the published channel statistics."""
        center, std = self._statistics(mean)
        return ((mean.float() - center) / std).to(mean.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The latent's mean and deviation, float32 [1, z, 1, 1, 1], copied to a device once: a copy
        from the host cannot be captured in a CUDA graph."""
        if like.device not in self._on_device:
            config = self.config
            with torch.inference_mode(False):
                stacked = torch.tensor((config.latent_mean, config.latent_std), device=like.device)
                self._on_device[like.device] = stacked.view(2, 1, -1, 1, 1, 1)
        mean, std = self._on_device[like.device]
        return mean, std

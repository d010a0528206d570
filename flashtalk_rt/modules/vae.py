"""The WAN2.1 VAE: causal 3D convolutions, four frames a latent frame, with explicit caches.

Parameter names are the published checkpoint's.  A convolution looks two frames back; what it must
remember between calls is a tensor in a `Cache`, so encoding and decoding can go one latent frame
at a time with exactly the result of going all at once.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import VAEConfig

Cache = list[Tensor | None]

ENCODE_STEP = 4  # frames a step after the first frame
STRIDE = 8  # pixels a latent pixel


class CacheCursor:
    """Walks a cache through one forward pass: each layer takes its past and puts its future."""

    def __init__(self, cache: Cache | None) -> None:
        self._past = cache
        self.future: Cache = []

    def take(self) -> Tensor | None:
        """The next layer's past; None at the start of a video."""
        # A layer takes and then puts, so what was put so far counts the layers before this one.
        return None if self._past is None else self._past[len(self.future)]

    def put(self, future: Tensor) -> None:
        self.future.append(future)


class RMSNorm(nn.Module):
    """Normalise over channels: x / |x| * sqrt(C) * gamma."""

    def __init__(self, dim: int, *, image: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *((1,) * (2 if image else 3))))

    def forward(self, x: Tensor) -> Tensor:
        # |x| = sqrt(C) rms(x), so this is RMSNorm along the innermost axis of a channels-last tensor;
        # the epsilon only keeps an all-zero pixel zero, as the published clamp of |x| does.
        return F.rms_norm(x.movedim(1, -1), x.shape[1:2], self.gamma.flatten(), 1e-24).movedim(-1, 1)


class Conv3d(nn.Conv3d):
    """The parameters of `nn.Conv3d`, computed by `ops.conv3d`."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return ops.conv3d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class CausalConv3d(Conv3d):
    """A 3D convolution that sees this frame and the two before it, zeros before the start."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int) -> None:
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor, cursor: CacheCursor | None = None) -> Tensor:
        """x [B, C, T, H, W]; the cursor is needed unless the kernel is one frame long."""
        if self.kernel_size[0] == 1:
            return super().forward(x)
        if cursor is None:
            raise ValueError("a temporal convolution needs a cache cursor")
        past = cursor.take()
        if past is None:
            past = x.new_zeros(*x.shape[:2], 2, *x.shape[3:])
        x = torch.cat((past, x), dim=2)
        cursor.put(x[:, :, -2:])
        return super().forward(x)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, 3),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),  # the published dropout, which keeps the next convolution's index
            CausalConv3d(out_dim, out_dim, 3),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, cursor: CacheCursor) -> Tensor:
        y = run(self.residual, x, cursor)
        return y + self.shortcut(x)  # type: ignore[no-any-return]


class SpatialAttention(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, image=True)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        images = x.transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_qkv(self.norm(images)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        out: Tensor = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        out = self.proj(out.unflatten(2, (height, width)))
        out = out.unflatten(0, (batch, frames)).transpose(1, 2)
        return x + out


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2D layer to every frame of [B, C, T, H, W]."""
    batch, frames = x.shape[0], x.shape[2]
    y: Tensor = layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames))
    return y.transpose(1, 2)


class Downsample(nn.Module):
    """Halve the picture, and the frame rate too when `temporal`."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cursor: CacheCursor) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = cursor.take()
        cursor.put(x[:, :, -1:])
        if past is None:  # the first frame stands alone
            return x
        return self.time_conv(torch.cat((past, x), dim=2))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double the picture, and the frame rate too when `temporal`."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = Conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cursor: CacheCursor) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, cursor)
        return per_frame(self.resample, x)

    @staticmethod
    def _double_frames(time_conv: Conv3d, x: Tensor, cursor: CacheCursor) -> Tensor:
        past = cursor.take()
        if past is None:  # the first frame is not doubled, and the second sees zeros as its past
            cursor.put(x.new_zeros(*x.shape[:2], 2, *x.shape[3:]))
            return x
        x = torch.cat((past, x), dim=2)
        cursor.put(x[:, :, -2:])
        # Twice the channels, first half the earlier frame: interleave the halves in time.
        return torch.stack(time_conv(x).chunk(2, dim=1), dim=3).flatten(2, 3)


def run(layers: nn.Sequential | nn.ModuleList, x: Tensor, cursor: CacheCursor) -> Tensor:
    """Apply the layers in order, handing the cursor to those that remember."""
    for layer in layers:
        remembers = isinstance(layer, CausalConv3d | ResidualBlock | Downsample | Upsample)
        x = layer(x, cursor) if remembers else layer(x)
    return x


def middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), SpatialAttention(dim), ResidualBlock(dim, dim))


def head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(dim), nn.SiLU(), CausalConv3d(dim, out_dim, 3))


# Whether each of the three scale changes also halves (or doubles) the frame rate.
TEMPORAL_DOWN = (False, True, True)


class Encoder(nn.Module):
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
        x = self.conv1(x, cursor)
        for layers in (self.downsamples, self.middle, self.head):
            x = run(layers, x, cursor)
        return x


class Decoder(nn.Module):
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

    def forward(self, x: Tensor, cursor: CacheCursor) -> Tensor:
        x = self.conv1(x, cursor)
        for layers in (self.middle, self.upsamples, self.head):
            x = run(layers, x, cursor)
        return x


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

    def encode(self, video: Tensor) -> Tensor:
        """The latent's mean, normalised.  video [B, 3, T, H, W], T = 1 + 4 n, H and W divisible by
        8, in [-1, 1].  Returns [B, z, 1 + n, H/8, W/8]."""
        mean, _ = self.encode_distribution(video)
        return self.normalize(mean)

    def encode_distribution(self, video: Tensor, step: int = ENCODE_STEP) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the unnormalised latent, each [B, z, 1 + n, H/8, W/8].

        `step`: frames at a time after the first, a multiple of 4.  More is faster on a short clip and
        takes more memory; the result is the same.
        """
        frames, height, width = video.shape[2:]
        if frames % ENCODE_STEP != 1 or height % STRIDE or width % STRIDE:
            raise ValueError(
                f"cannot encode {frames} frames of {height} x {width}: "
                "frames must be 1 + 4 n, sides divisible by 8"
            )
        video = self._channels_last(video.to(self.dtype))
        cache: Cache | None = None
        parts = []
        for start in (0, *range(1, frames, step)):
            cursor = CacheCursor(cache)
            end = start + step if start else 1
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

    def decode_step(self, latent: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Decode the next latent frames of a video.

        latent [B, z, t, h, w], normalised, t = 1 when `cache` is None (the start); -> the frames
        (1 at the start, else 4 t) and the cache for the next call.
        """
        if cache is None and latent.shape[2] != 1:
            raise ValueError(f"the first decode step takes one latent frame, not {latent.shape[2]}")
        mean, std = self._statistics(latent)
        z = self.conv2(self._channels_last((latent.float() * std + mean).to(self.dtype)))
        cursor = CacheCursor(cache)
        return self.decoder(z, cursor), cursor.future

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

    @staticmethod
    def _channels_last(x: Tensor) -> Tensor:
        # Every convolution then runs NDHWC, which cuDNN and oneDNN both prefer.
        return x.contiguous(memory_format=torch.channels_last_3d)

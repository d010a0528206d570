"""The layers of the WAN2.1 VAE, and what they remember between calls.

Activations are [B, C, T, H, W] in NDHWC (channels_last_3d), which cuDNN, oneDNN and our kernels all prefer.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..profiles import nvtx

Cache = list[Tensor | None]


class CacheCursor:
    """Walks a cache through one forward pass: each layer takes its past and puts its future.

    rooms: a tensor a layer, for what the layer remembers and the frames of one call in front of it.  The
    future then lies in the rooms' last frames, and the past may lie there until then.
    keep: whether anything comes after; if not, no future is held while the pass goes on.
    copy: hold copies of the futures, not views, which keep whole inputs of convolutions.
    """

    def __init__(
        self,
        cache: Cache | None,
        rooms: list[Tensor] | None = None,
        *,
        keep: bool = True,
        copy: bool = False,
    ) -> None:
        self._past = cache
        self._rooms, self._keep, self._copy = rooms, keep, copy
        self.future: Cache = []
        self.inputs: dict[int, int] = {}  # layer -> frames of its convolution's input, if it asked for room

    def take(self) -> Tensor | None:
        """The next layer's past; None at the start of a video."""
        # A layer takes and then puts, so what was put so far counts the layers before this one.
        return None if self._past is None else self._past[len(self.future)]

    def room(self, frames: int) -> Tensor | None:
        """Where the next layer shall write its convolution's input, so many frames and the two past ones in
        front; None: where it likes."""
        layer = len(self.future)
        self.inputs[layer] = 2 + frames
        return None if self._rooms is None else self._rooms[layer][:, :, -(2 + frames) :]

    def put(self, future: Tensor) -> None:
        """What this layer is to see as its past in the next call; the cursor goes on to the next layer."""
        if self._rooms is not None:
            room = self._rooms[len(self.future)][:, :, -future.shape[2] :]
            if future.data_ptr() != room.data_ptr():
                room.copy_(future)  # a layer that asked for no room
            future = room
        if self._keep and self._copy:
            future = future.clone(memory_format=torch.channels_last_3d)
        self.future.append(future if self._keep else None)


class RoomPlanner(CacheCursor):
    """Notes the rooms that a pass like this one needs, on the meta device, and holds no future."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self.rooms: list[Tensor] = []

    def put(self, future: Tensor) -> None:
        frames = self.inputs.get(len(self.future), future.shape[2])
        shape = (*future.shape[:2], frames, *future.shape[3:])
        ndhwc = torch.channels_last_3d
        self.rooms.append(torch.empty(shape, dtype=future.dtype, device="meta", memory_format=ndhwc))
        self.future.append(None)


class RMSNorm(nn.Module):
    """Normalise over channels: x / |x| * sqrt(C) * gamma.

    Before a SiLU and a causal convolution, `ops.norm_silu` does it all with this gamma.
    """

    def __init__(self, dim: int, *, image: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *((1,) * (2 if image else 3))))

    def forward(self, rows: Tensor) -> Tensor:
        """rows [..., C]."""
        # The epsilon only keeps an all-zero pixel zero, as the published clamp of |x| does.
        return F.rms_norm(rows, rows.shape[-1:], self.gamma.flatten(), 1e-24)


class Conv3d(nn.Conv3d):
    """The parameters of `nn.Conv3d`, computed by `ops.conv3d`, or `ops.slice_conv` where that is faster."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self._sliced(x)
        if y is None:
            y = ops.conv3d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
        return y

    def deferring_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution, and its bias if whoever reads it shall add it.

        torch adds the bias of cuDNN's convolutions in a pass of its own; oneDNN and `ops.slice_conv` add it
        for nothing.
        """
        if not x.is_cuda:
            return self(x), None
        y = self._sliced(x)
        if y is not None:
            return y, None
        y = ops.conv3d(x, self.weight, None, self.stride, self.padding)  # type: ignore[arg-type]
        return y, self.bias.to(y.dtype)  # under autocast the parameters are wider

    def adding(self, x: Tensor, shortcut: Tensor, more_bias: Tensor | None) -> Tensor | Sum:
        """The convolution plus `shortcut` and its bias, which `ops.slice_conv` adds where it serves."""
        total = self._sliced(x, shortcut, more_bias)
        if total is not None:
            return total
        y, bias = self.deferring_bias(x)
        if bias is None or more_bias is None:
            return Sum(y, more_bias if bias is None else bias, shortcut)
        return Sum(y, bias + more_bias, shortcut)

    def _sliced(
        self, x: Tensor, shortcut: Tensor | None = None, more_bias: Tensor | None = None
    ) -> Tensor | None:
        """With all that is to be added, where `ops.slice_conv` is the faster one."""
        side = self.kernel_size[2] // 2
        if self.stride != (1, 1, 1) or self.padding != (0, side, side):
            return None
        if not ops.slice_conv_wins(x, self.weight):
            return None
        y = ops.slice_conv(
            x[0].permute(1, 2, 3, 0),
            self.weight.permute(0, 2, 3, 4, 1),
            self.bias if more_bias is None else self.bias + more_bias,
            None if shortcut is None else shortcut[0].permute(1, 2, 3, 0),
        )
        return y.permute(3, 0, 1, 2)[None]


class CausalConv3d(Conv3d):
    """A 3D convolution that sees this frame and the two before it, zeros before the start.

    Past and frames come as one input, [B, C, 2 + T, H, W]: `with_past` makes it, or `norm_silu`.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: int) -> None:
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel // 2, kernel // 2))


class Sum(NamedTuple):
    """What a residual block may leave to its reader: x + bias + shortcut, which a norm adds on its way."""

    x: Tensor
    bias: Tensor | None
    shortcut: Tensor


def added(stream: Tensor | Sum) -> Tensor:
    """The stream itself, for a reader that is no norm."""
    return ops.add_residual(*stream) if isinstance(stream, Sum) else stream


def with_past(x: Tensor, cursor: CacheCursor) -> Tensor:
    """x [B, C, T, H, W] behind its two past frames, zeros at the start of a video."""
    x = ops.with_past(x, cursor.take())
    cursor.put(x[:, :, -2:])
    return x


_Residual = tuple[RMSNorm, nn.SiLU, CausalConv3d, RMSNorm, nn.SiLU, nn.Identity, CausalConv3d]


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a norm and a SiLU, beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # The published places; SiLU is part of `ops.norm_silu`, the identity stands for the dropout.
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, 3),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(out_dim, out_dim, 3),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    @nvtx.range("vae/residual_block")
    def forward(self, stream: Tensor | Sum, cursor: CacheCursor) -> Tensor | Sum:
        """[B, in, T, H, W] -> [B, out, T, H, W], each whole or as the sum that it is."""
        norm1, _, conv1, norm2, _, _, conv2 = cast(_Residual, tuple(self.residual))
        past = cursor.take()
        if isinstance(stream, Sum):
            room = cursor.room(stream.x.shape[2])
            x, y = ops.add_norm_silu(*stream, norm1.gamma.flatten(), past, out=room)
        else:
            room = cursor.room(stream.shape[2])
            x, y = stream, ops.norm_silu(stream, norm1.gamma.flatten(), past, out=room)
        cursor.put(y[:, :, -2:])
        y, bias = conv1.deferring_bias(y)
        room = cursor.room(y.shape[2])
        y = ops.norm_silu(y, norm2.gamma.flatten(), cursor.take(), bias, out=room)
        cursor.put(y[:, :, -2:])
        if isinstance(self.shortcut, CausalConv3d):
            return conv2.adding(y, *self.shortcut.deferring_bias(x))
        return conv2.adding(y, x, None)


class SpatialAttention(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, image=True)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    @nvtx.range("vae/attention")
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        # On NDHWC activations a frame's pixels are rows already, and a 1x1 convolution is a linear layer.
        rows = self.norm(x.movedim(1, -1).flatten(2, 3))  # [B, T, H * W, C]
        q, k, v = F.linear(rows, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
        out: Tensor = ops.pixel_attention(q, k, v)
        out = F.linear(out, self.proj.weight.flatten(1), self.proj.bias).unflatten(2, x.shape[3:])
        return x + out.movedim(-1, 1)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2D layer to every frame of [B, C, T, H, W]."""
    batch, frames = x.shape[0], x.shape[2]
    y: Tensor = layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames))
    return y.transpose(1, 2)


class Downsample(nn.Module):
    """Halve the picture, and the frame rate too when `temporal`.

    [B, C, T, H, W] -> [B, C, T or T / 2, H / 2, W / 2].  A video's first frame stands alone: `temporal` makes
    1 + n frames of its first 1 + 2 n.
    """

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    @nvtx.range("vae/downsample")
    def forward(self, x: Tensor, cursor: CacheCursor) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = cursor.take()
        cursor.put(x[:, :, -1:])
        if past is not None:
            return self.time_conv(ops.with_past(x, past))  # type: ignore[no-any-return]
        if x.shape[2] == 1:
            return x
        # The first frame is the past of those behind it.
        return ops.with_past(self.time_conv(x), x[:, :, :1])


class Upsample(nn.Module):
    """Double the picture, and the frame rate too when `temporal`.

    [B, C, T, H, W] -> [B, C / 2, T or 2 T, 2 H, 2 W]; a video's first frame is not doubled.
    """

    folded: Tensor | None  # the convolution's weights for `ops.upsample_conv`, once `fold` made them

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = Conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None
        self.register_buffer("folded", None, persistent=False)

    def fold(self) -> None:
        """Compute the same from the small picture from now on; the weights must not change any more."""
        self.folded = ops.fold_upsampled(self._conv.weight.detach())

    @property
    def _conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.resample[1])

    @nvtx.range("vae/upsample")
    def forward(self, x: Tensor, cursor: CacheCursor) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, cursor)
        if self.folded is None:
            return per_frame(self.resample, x)
        assert self._conv.bias is not None
        return ops.upsample_conv(x, self.folded, self._conv.bias)

    @staticmethod
    def _double_frames(time_conv: Conv3d, x: Tensor, cursor: CacheCursor) -> Tensor:
        past = cursor.take()
        if past is None:  # the first frame is not doubled, and the second sees zeros as its past
            cursor.put(x.new_zeros(*x.shape[:2], 2, *x.shape[3:]))
            return x
        x = ops.with_past(x, past)
        cursor.put(x[:, :, -2:])
        return ops.double_frames(*time_conv.deferring_bias(x))


def run(layers: nn.Sequential, stream: Tensor | Sum, cursor: CacheCursor) -> Tensor | Sum:
    """Apply the layers in order, handing the cursor to those that remember."""
    for layer in layers:
        if isinstance(layer, ResidualBlock):
            stream = layer(stream, cursor)
        elif isinstance(layer, Downsample | Upsample):
            stream = layer(added(stream), cursor)
        else:
            stream = layer(added(stream))
    return stream

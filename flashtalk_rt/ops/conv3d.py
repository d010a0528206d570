"""3D convolution through the library that is fastest for it on this device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import TORCH, Backend, OpSpec, Situation, backend_for


def _onednn(situation: Situation) -> str | None:
    if situation.device_type != "cpu":
        return f"runs on the CPU, this is {situation.device_type}"
    if situation.grad:
        return "has no gradient"
    if situation.dtype != torch.float32:
        return f"asked for by hand in float32 only, this is {situation.dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    return None


def _padded(situation: Situation) -> str | None:
    if situation.device_type != "cuda":
        return f"needs a CUDA device, this is {situation.device_type}"
    if situation.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, this is {situation.dtype}"
    return None


# F.conv3d keeps small float32 batches away from oneDNN and takes a path up to 15 times slower
# (62 ms against 4 for 16 channels at 96 x 96 on two AVX2 cores), so oneDNN is named here.
SPEC = OpSpec("conv3d", (Backend("onednn", _onednn), Backend("padded", _padded), TORCH))

# cuDNN's fast half-precision kernels take input channels in multiples of this.  The VAE's first convolution,
# 3 -> 96 at 768 x 448, took 0.45 ms a call on an H100 without them; its bytes take 0.1.
CHANNEL_MULTIPLE = 8


def padded_channels(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, C, T, H, W] and weight [O, C, kt, kh, kw] with zeros behind their channels up to the next
    `CHANNEL_MULTIPLE`, each in its own layout: another pair with the same convolution."""
    missing = -x.shape[1] % CHANNEL_MULTIPLE
    if not missing:
        return x, weight
    behind = (0, 0, 0, 0, 0, 0, 0, missing)  # F.pad counts from the last dimension
    return F.pad(x, behind), F.pad(weight, behind)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """x [B, C, T, H, W], weight [O, C, kt, kh, kw], bias [O] or None -> [B, O, T', H', W'], x's dtype.

    oneDNN and cuDNN give a channels-last result for channels-last inputs and weights.  Half precision on a
    GPU goes through `padded_channels`.
    """
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    backend = backend_for(SPEC, x.device, x.dtype, grad=grad)
    if backend == "onednn":
        out: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
        return out
    if backend == "padded":
        x, weight = padded_channels(x, weight)
    return F.conv3d(x, weight, bias, stride, padding)

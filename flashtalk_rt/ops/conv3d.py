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


# F.conv3d keeps small float32 batches away from oneDNN and takes a path up to 15 times slower
# (62 ms against 4 for 16 channels at 96 x 96 on two AVX2 cores), so oneDNN is named here.
SPEC = OpSpec("conv3d", (Backend("onednn", _onednn), TORCH))


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """x [B, C, T, H, W], weight [O, C, kt, kh, kw], bias [O] or None -> [B, O, T', H', W'], x's dtype.

    oneDNN and cuDNN give a channels-last result for channels-last inputs and weights.
    """
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if backend_for(SPEC, x.device, x.dtype, grad=grad) == "onednn":
        out: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
        return out
    return F.conv3d(x, weight, bias, stride, padding)

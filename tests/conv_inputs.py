"""What the tests of the slice convolution share: its kernels, and inputs for them."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

KERNELS = [(3, 3), (1, 3), (3, 1), (1, 1)]  # frames, side
DTYPES = [torch.bfloat16, torch.float16]
op = importlib.import_module("flashtalk_rt.ops.slice_conv")  # `ops` may hold the function under this name


def conv_inputs(
    size: tuple[int, int, int], channels: tuple[int, int], kernel: tuple[int, int], device: str = "cpu"
) -> dict[str, Tensor]:
    """x [frames + kernel's - 1, height, width, in], weight, bias and residual, by name: random, float32."""
    make = op._case(size, channels, kernel, residual=True).make
    inputs: dict[str, Tensor] = make(
        torch.device(device), torch.float32, torch.Generator(device).manual_seed(0)
    )
    return inputs

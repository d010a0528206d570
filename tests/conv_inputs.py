"""What the tests of the slice convolution share: its kernels, and inputs for them."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

KERNELS = [(3, 3), (1, 3), (3, 1), (1, 1)]  # frames, side
DTYPES = [torch.bfloat16, torch.float16]
# (frames, height, width), channels: one of every tile of 1 and of 3 pixels a side, as
# csrc/tests/slice_conv_model.cpp finds, and more tiles than an H100 has multiprocessors.
SIZES_OF_MANY_TILES = [
    ((2, 260, 192), (64, 96)),
    ((1, 260, 192), (64, 192)),
    ((4, 70, 130), (64, 96)),
    ((4, 33, 130), (64, 192)),
]
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

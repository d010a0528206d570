"""float8 e4m3 with one scale a row: what the producing kernels emit and `linear_fp8` consumes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # its largest value


class Quantized(NamedTuple):
    """A tensor as data * scale: data [..., D] float8 e4m3, scale [..., 1] float32, a row its own."""

    data: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., D] in `dtype`."""
        return (self.data.float() * self.scale).to(dtype)


def quantize(x: Tensor) -> Quantized:
    """Round each row of [..., D] to e4m3 by its largest magnitude: s = max|x| / 448, 1 for zeros."""
    rows = x.float()
    largest = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    return Quantized((rows / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)

"""Random tensors for tests, the same for the same seed on every device; and new memory that is NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal values, drawn in float32 on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def qkv(length: int, batch: int = 1, heads: int = 2, dim: int = 16, device: str = "cpu") -> list[Tensor]:
    """Queries, keys and values [batch, length, heads, dim], float32."""
    return [normal(batch, length, heads, dim, seed=i, device=device) for i in range(3)]


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)

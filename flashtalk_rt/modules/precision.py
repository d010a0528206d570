"""Which number formats a device computes natively."""

from __future__ import annotations

import torch


def native_bf16(device: torch.device) -> bool:
    """Whether `device` has bfloat16 arithmetic of its own; elsewhere it is emulated, and slow."""
    # Private, but torch has no public test for a CPU's bf16 units.
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device) -> torch.autocast:
    """Training's mixed precision: bfloat16 where `device` has it, else float32.

    No cache of cast weights: a captured CUDA graph would keep using the first step's.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device), cache_enabled=False)

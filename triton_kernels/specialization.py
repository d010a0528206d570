"""What a kernel is compiled for, without a GPU and without tensors; and how many programs a GPU holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import triton


@dataclasses.dataclass(frozen=True)
class Specialization:
    """One compiled form of a kernel.

    signature: parameter name -> Triton type ("*bf16", "i32", "fp32") of everything that is no constexpr;
    constants: the constexpr parameters' values.
    """

    kernel: triton.JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, int | float | bool | None]
    num_warps: int = 4
    num_stages: int = 3


def multiprocessors(device: torch.device) -> int:
    """How many there are, for kernels whose programs stay on one; in the interpreter, some."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3

"""What a kernel is compiled for: enough to compile it without a GPU and without tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

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

"""How every kernel is launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from triton.runtime._async_compile import active_mode


def launch(kernel: triton.JITFunction, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`; inside `triton.AsyncCompileMode`, no more than the start of its
    compilation, on one of that mode's threads: outputs then keep whatever they held.

    Triton itself would wait there for each kernel before the next, as it does outside.
    """
    if active_mode.get() is None:
        kernel[grid](*arguments, **options)
    else:
        kernel.warmup(*arguments, grid=grid, **options)

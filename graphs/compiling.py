"""Triton's kernels, compiled side by side."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class _Compilers(ThreadPoolExecutor):
    """Threads that make the kernels which they compile ready to be launched."""

    def submit(self, compile_kernel: Callable[..., Any], /, *_: Any, **__: Any) -> Future[Any]:
        device = torch.cuda.current_device()

        def make() -> Any:
            kernel = compile_kernel()
            with torch.cuda.device(device):
                _ = kernel.run  # for this Triton has the C compiler build a launcher, and loads both
            return kernel

        return super().submit(make)


def compile_ahead(work: Callable[[], object]) -> None:
    """Run `work`, whose Triton kernels are compiled for the current CUDA device, on a thread a core, and not
    launched: what they would have computed stays as it was.

    Their launchers must know `triton.AsyncCompileMode`.  A kernel that cannot be compiled is left out: the
    first launch will say why.  Compiled one by one, as they are launched, the kernels of a 14B chunk take
    longer than all else before its first frame.  Without Triton there are none, and nothing is run.
    """
    try:
        import triton
    except ImportError:
        return

    def compile_all() -> None:
        threads = _Compilers(os.cpu_count())
        with threads, triton.AsyncCompileMode(threads, ignore_errors=True):
            work()

    # In a copy of the context, for the mode stays set where an interrupt ends it.
    contextvars.copy_context().run(compile_all)

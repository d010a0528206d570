"""Triton's kernels, compiled side by side."""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class _Compilers(ThreadPoolExecutor):
    """Threads that make the kernels which they compile ready to be launched, until they are stopped."""

    stopped = False

    def submit(self, compile_kernel: Callable[..., Any], /, *_: Any, **__: Any) -> Future[Any]:
        device = torch.cuda.current_device()

        def make() -> Any:
            if self.stopped:
                raise RuntimeError("compilation was stopped")
            kernel = compile_kernel()
            with torch.cuda.device(device):
                _ = kernel.run  # for this Triton has the C compiler build a launcher, and loads both
            return kernel

        return super().submit(make)

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> bool | None:
        self.stopped = self.stopped or kind is not None
        return super().__exit__(kind, *details)


def compile_ahead(work: Callable[[], object], device: torch.device) -> None:
    """Run `work` for the Triton kernels that it launches: they are compiled, on several threads at once, and
    not run.  On a device that is no CUDA device, or without a Triton that can (3.6), nothing is run.

    Compiled one by one, as they are launched, the kernels of a 14B chunk take longer than all else that comes
    before its first frame.  What is not Triton's does run, on outputs of kernels that did not: `work` must
    not branch on values, and what it computes is of no use.  Launchers must know `triton.AsyncCompileMode`.
    A kernel that cannot be compiled is left out: its first launch will say why.  Raises what `work` raises;
    after that, or an interrupt, no further kernel is begun.
    """
    if device.type != "cuda":
        return
    try:
        import triton
    except ImportError:
        return
    if "ignore_errors" not in inspect.signature(triton.AsyncCompileMode).parameters:
        return

    def compile_all() -> None:
        threads = _Compilers()
        with threads, triton.AsyncCompileMode(threads, ignore_errors=True):
            try:
                work()
            except BaseException:
                threads.stopped = True  # leaving the mode waits for what is compiled
                raise

    # In a copy of the context: the mode stays set where an interrupt ends the wait at its end.
    contextvars.copy_context().run(compile_all)

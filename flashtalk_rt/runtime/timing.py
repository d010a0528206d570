"""Milliseconds a stage, on the clock of the device that runs it, without stopping it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..profiles import nvtx


class StageClock:
    """Times named stages and marks them for a profiler.

    On CUDA a stage is a pair of events, read only when `timings_ms` is asked for (after the chunk's
    copy to the host, when they are long done); on the CPU it is the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._wall_ms: dict[str, float] = {}
        self._events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with nvtx.range(f"chunk/{name}"):
            if self._cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                yield
                end.record()
                self._events[name] = (start, end)
            else:
                begin = time.perf_counter()
                yield
                self._wall_ms[name] = (time.perf_counter() - begin) * 1e3

    def timings_ms(self) -> dict[str, float]:
        """Stage name -> milliseconds; waits for stages still running."""
        for name, (start, end) in self._events.items():
            end.synchronize()
            self._wall_ms[name] = start.elapsed_time(end)
        return dict(self._wall_ms)

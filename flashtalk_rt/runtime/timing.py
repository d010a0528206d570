"""Milliseconds a stage, on the clock of the device that runs it, without stopping it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..profiles import nvtx


class StageClock:
    """Times one chunk's stages from the moment it is made, and marks them for a profiler.

    On CUDA a moment is an event on the current stream, read only when `timings_ms` is asked for; on the CPU
    it is the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self._stages: defaultdict[str, list[tuple[Moment, Moment]]] = defaultdict(list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs inside is the stage `name`, or one more part of it."""
        with nvtx.range(f"chunk/{name}"):
            begin = self._now()
            yield
            self._stages[name].append((begin, self._now()))

    def mark(self, name: str) -> None:
        """`name` is the time from the clock's start until the current stream gets here."""
        self._stages[name] = [(self._start, self._now())]

    def timings_ms(self) -> dict[str, float]:
        """Name -> milliseconds; waits for stages still running."""
        return {name: sum(elapsed_ms(*part) for part in parts) for name, parts in self._stages.items()}

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


Moment = float | torch.cuda.Event  # seconds of the wall clock, or a point in a stream


def elapsed_ms(begin: Moment, end: Moment) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return (end - begin) * 1e3
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed

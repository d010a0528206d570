"""How long a callable takes on the device that runs it: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
HEAD_START_CYCLES = 50_000_000  # of the GPU's clock: some 30 ms
AHEAD = 1.5  # device time over host time of a call that the host launches safely faster than it runs


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing, in milliseconds, in the order they were taken."""

    samples_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples_ms:
            raise ValueError("a timing needs at least one sample")

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def p95_ms(self) -> float:
        """Nearest rank: the smallest sample that 95 % of all do not exceed."""
        ordered = sorted(self.samples_ms)
        return ordered[-(-95 * len(ordered) // 100) - 1]

    @property
    def spread_ms(self) -> float:
        """From the fastest to the slowest."""
        return max(self.samples_ms) - min(self.samples_ms)


def measure(
    work: Callable[..., Any],
    device: torch.device,
    inputs: Sequence[Sequence[Any]] = ((),),
    repeats: int = 20,
    warm_ups: int = 3,
    settle_ms: float = 0.0,
) -> Timing:
    """Time `work(*inputs[i])`, taking the inputs in turn, after `warm_ups` calls that do not count.

    On CUDA every sample is the time between two events around the call on the current stream, and the host
    waits only at the end; on a CPU it is the call's wall clock.  Pass several inputs (`rotation`) where one
    would stay in the cache between calls.

    settle_ms: let calls that the host launches faster than they run, run so long first, for the clocks that
    the GPU can hold under this load; an H100 that comes from idling multiplies a tenth faster than in the
    middle of a chunk.
    """
    turns = itertools.cycle(inputs)
    for _ in range(warm_ups):
        work(*next(turns))
    if device.type != "cuda":
        samples_ms = []
        for _ in range(repeats):
            arguments = next(turns)
            begin = time.perf_counter()
            work(*arguments)
            samples_ms.append((time.perf_counter() - begin) * 1e3)
        return Timing(tuple(samples_ms))
    stream = torch.cuda.current_stream(device)
    events = []
    with torch.cuda.stream(stream):
        device_ms, host_ms = _once_ms(lambda: work(*next(turns)), stream) if settle_ms else (0.0, 0.0)
        if device_ms > AHEAD * host_ms:
            for _ in range(math.ceil(settle_ms / device_ms)):
                work(*next(turns))
        else:
            # Launching a small op takes the host longer than running it takes the device: keep the device
            # busy until the queue is filled, or the events would time the host.
            torch.cuda._sleep(HEAD_START_CYCLES)
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        arguments = next(turns)
        start.record(stream)
        work(*arguments)
        end.record(stream)
        events.append((start, end))
    stream.synchronize()
    return Timing(tuple(start.elapsed_time(end) for start, end in events))


def _once_ms(call: Callable[[], object], stream: torch.cuda.Stream) -> tuple[float, float]:
    """What one call takes the device, and what launching it takes the host."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START_CYCLES)  # else the device would wait for the host between its kernels
    start.record(stream)
    begin = time.perf_counter()
    call()
    host_ms = (time.perf_counter() - begin) * 1e3
    end.record(stream)
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms, host_ms


def rotation(make: Callable[[], T], size_bytes: int, device: torch.device) -> list[T]:
    """Inputs of `size_bytes` each, as many as it takes for none to be in the L2 cache when its turn comes
    again; one on a CPU, where the tests run and nothing is claimed."""
    if device.type != "cuda":
        return [make()]
    l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
    return [make() for _ in range(1 + -(-2 * l2_bytes // max(1, size_bytes)))]

"""A second CUDA stream beside the one that computes; on the CPU, where nothing overlaps, its interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..graphs.capture import make_workspace


class Lane:
    """Work that may overlap the current stream's.  Several threads may use one lane."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        """priority: the stream's; kernels of -1 start before waiting ones of 0, where streams compute."""
        self._stream = torch.cuda.Stream(device, priority) if device.type == "cuda" else None

    def prepare_products(self) -> None:
        """For a lane that networks run on: see `make_workspace`."""
        if self._stream is not None:
            make_workspace(self._stream)

    @contextmanager
    def use(self) -> Iterator[None]:
        """What is launched inside goes to the lane, behind what it was given before."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def follow(self) -> None:
        """What the lane is given from now on starts after what the current stream was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def mark(self) -> torch.cuda.Event | None:
        """The point that the lane's work has reached once all it was given so far is done."""
        return None if self._stream is None else self._stream.record_event()

    def join(self, mark: torch.cuda.Event | None) -> None:
        """The current stream goes on after `mark`; the host does not wait."""
        if self._stream is not None and mark is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(mark)

    def wait(self) -> None:
        """The host waits until the lane has done all it was given."""
        if self._stream is not None:
            self._stream.synchronize()

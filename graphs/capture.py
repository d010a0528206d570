"""Callables over static buffers, run as CUDA graphs or eagerly through one interface."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import InputError

Work = Callable[[], None]


class Graphs:
    """Makes callables ready to run again and again: captured as CUDA graphs, or left as they are.

    A callable takes nothing and returns nothing: it reads and writes static buffers that outlive the
    graphs, launches on the current stream only, and neither synchronises nor copies from the host.  Because
    nothing else passes between graphs, all of them share one memory pool, and they may be replayed in any
    order, one at a time.
    """

    def __init__(self, device: torch.device, capture: bool) -> None:
        """Raises InputError where `device` cannot capture."""
        if capture and device.type != "cuda":
            raise InputError(
                f"CUDA graphs cannot be captured on {device}; use capture=False, or a CUDA device"
            )
        self.captured = capture
        self._graphs: list[torch.cuda.CUDAGraph] = []
        if capture:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def add(self, work: Work) -> Work:
        """What to call to run `work`: a graph's replay, or `work` itself where nothing is captured.

        To capture, `work` is run once before, on the capturing stream, so that whatever is made at first
        use (library handles, workspaces, compiled kernels, constants on the device) exists already.  The
        buffers then hold whatever that run left in them.
        """
        if not self.captured:
            return work
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
        graph = torch.cuda.CUDAGraph()
        # Entering it synchronises and returns the warm-up's memory.  Other threads may go on using CUDA.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._graphs.append(graph)
        return graph.replay

    def __len__(self) -> int:
        """Graphs captured and not destroyed."""
        return len(self._graphs)

    def close(self) -> None:
        """Destroy every graph and return the pool's memory; what `add` returned must not be called again.

        Waits for replays still running.  Does nothing a second time.
        """
        if not self._graphs:
            return
        torch.cuda.synchronize(self._stream.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        torch.cuda.empty_cache()

"""Callables over static buffers, run as CUDA graphs or eagerly through one interface."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import torch

from ..errors import InputError

Work = Callable[[], None]

# Held while a graph is captured or destroyed.  One for the process, since torch captures one graph at a time
# in a process: both synchronise the device, which fails while another thread captures.
_CAPTURING = threading.Lock()


def release_memory() -> None:
    """Return what torch holds in reserve on CUDA devices to them, at a moment when no thread captures."""
    with _CAPTURING:
        torch.cuda.empty_cache()


def make_workspace(stream: torch.cuda.Stream) -> None:
    """Have cuBLAS make what it keeps for `stream` as long as the process lives: 34 MB, alone in their block.

    Made later, amid a network's memory, they pin the whole cached block that they are cut from: 331 MB an
    engine on an H100, which no later engine could use.
    """
    with _CAPTURING, torch.cuda.stream(stream):
        torch.cuda.empty_cache()
        few = torch.zeros(16, 16, device=stream.device)
        torch.mm(few, few)


class Replay:
    """What `Graphs.add` returns: a graph, and the pool in which its tensors lie.

    A pool that is destroyed before its last graph ends the process, so whoever holds a graph holds the pool,
    and lets go of the graph first: attributes go in the order in which they were set.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool) -> None:
        self._graph, self._pool = graph, pool

    def __call__(self) -> None:
        self._graph.replay()


class Graphs:
    """Makes callables ready to run again and again: captured as CUDA graphs, or left as they are.

    A callable takes nothing and returns nothing: it reads and writes static buffers that outlive the
    graphs, launches on the current stream only, and neither synchronises nor copies from the host.  All
    graphs share one memory pool; as long as they pass on nothing else, they may be replayed in any order, one
    at a time.  A tensor that one graph allocates and a later one uses must be held until whatever may run
    between the two is captured.  Several threads may add, each to its own `Graphs`.
    """

    def __init__(self, device: torch.device, capture: bool) -> None:
        """Raises InputError where `device` cannot capture."""
        if capture and device.type != "cuda":
            raise InputError(
                f"CUDA graphs cannot be captured on {device}; use capture=False, or a CUDA device"
            )
        self.captured = capture
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool: torch.cuda.MemPool | None = None
        if capture:
            with torch.cuda.device(device):  # whose pool it becomes
                self._pool = torch.cuda.MemPool()
            self._stream = torch.cuda.Stream(device)
            make_workspace(self._stream)

    def add(self, work: Work, *, warm: bool = True) -> Work:
        """What to call to run `work`: a graph's replay, or `work` itself where nothing is captured.

        To capture, `work` is run once before, on the capturing stream, so that whatever is made at first
        use (library handles, workspaces, compiled kernels, constants on the device) exists already.  The
        buffers then hold whatever that run left in them.  warm=False leaves that run out, for work that
        launches nothing that was not launched before, on the same shapes.
        """
        if self._pool is None:
            return work
        with _CAPTURING:
            graph = self._capture(work, warm, self._pool)
        self._graphs.append(graph)
        return Replay(graph, self._pool)

    def _capture(self, work: Work, warm: bool, pool: torch.cuda.MemPool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        device = self._stream.device
        # What is held in reserve elsewhere is of no use to the pool.
        torch.cuda.empty_cache()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            if warm:  # in the pool, which has, or then keeps, what this takes
                with torch.cuda.use_mem_pool(pool, device):
                    work()
            # The first graph of a process makes the default generator's seed tensors, which every capture
            # writes to; made in inference mode, they break later captures outside it (pytorch#166792).
            with torch.inference_mode(False):
                graph.register_generator_state(torch.cuda.default_generators[device.index])
        name = cast(Any, pool.id)  # annotated as what graph_pool_handle() returns, which is such an id
        # Other threads may go on using CUDA.
        with torch.cuda.graph(graph, pool=name, stream=self._stream, capture_error_mode="thread_local"):
            work()
        torch.cuda.current_stream(device).wait_stream(self._stream)
        return graph

    def __len__(self) -> int:
        """Graphs captured and not destroyed."""
        return len(self._graphs)

    def close(self) -> None:
        """Destroy every graph and return the pool's memory; what `add` returned must not be called again,
        and should be let go of before: it keeps what a reset leaves of its graph.

        Waits for replays still running.  Does nothing a second time.
        """
        if self._pool is None:
            return
        with _CAPTURING:
            torch.cuda.synchronize(self._stream.device)
            while self._graphs:  # none outlives its turn, as a loop's variable would
                self._graphs.pop().reset()
            self._pool = None
            torch.cuda.empty_cache()

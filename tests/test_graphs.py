"""Static buffers and the callables over them, captured (on a GPU) or eager."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from flashtalk_rt.errors import InputError
from flashtalk_rt.graphs import capture
from flashtalk_rt.graphs.buffers import Buffers, copy_tree, layout, map_tensors, tensors
from flashtalk_rt.graphs.capture import Graphs

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


class Scaled(NamedTuple):
    data: Tensor
    scale: Tensor


@dataclasses.dataclass(frozen=True)
class Pair:
    left: tuple[Tensor, Tensor | None]
    right: list[Tensor]
    scale: float


def pair(value: float = 1.0, scale: float = 0.5) -> Pair:
    return Pair((torch.full((2, 3), value), None), [torch.full((4,), value, dtype=torch.bfloat16)], scale)


def test_like_makes_named_zero_buffers_of_the_same_layout() -> None:
    buffers = Buffers(CPU)
    held = buffers.like("pair", pair())
    assert isinstance(held, Pair) and held.left[1] is None and held.scale == 0.5
    assert layout(held) == layout(pair())
    assert [t.count_nonzero().item() for t in tensors(held)] == [0, 0]
    assert buffers["pair.left.0"] is held.left[0] and buffers["pair.right.0"] is held.right[0]
    assert len(buffers) == 2 and buffers.size_bytes == 6 * 4 + 4 * 2


def test_named_tuples_keep_their_type() -> None:
    held = Buffers(CPU).like("fp8", [Scaled(torch.ones(2), torch.ones(1))])
    assert isinstance(held[0], Scaled) and held[0].scale.shape == (1,)


def test_like_keeps_channels_last() -> None:
    frames = torch.zeros(1, 4, 2, 3, 5).contiguous(memory_format=torch.channels_last_3d)
    held = Buffers(CPU).like("frames", frames[:, :, -1:])
    assert held.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_name_has_one_owner() -> None:
    buffers = Buffers(CPU)
    buffers.zeros("x", (2,), torch.float32)
    with pytest.raises(ValueError, match="'x' exists"):
        buffers.zeros("x", (2,), torch.float32)


def test_layout_tells_shapes_dtypes_and_constants_apart() -> None:
    assert layout(pair(1.0)) == layout(pair(2.0))
    assert layout(pair(scale=0.5)) != layout(pair(scale=1.0))
    assert layout([torch.zeros(2)]) != layout([torch.zeros(3)])
    assert layout([torch.zeros(2)]) != layout([torch.zeros(2, dtype=torch.bfloat16)])
    assert layout([torch.zeros(2)]) != layout([torch.zeros(2), torch.zeros(2)])


def test_copy_tree_fills_in_place() -> None:
    held = Buffers(CPU).like("pair", pair())
    before = [t.data_ptr() for t in tensors(held)]
    copy_tree(held, pair(3.0))
    assert [t.data_ptr() for t in tensors(held)] == before
    assert all(bool((t == 3).all()) for t in tensors(held))


def test_copy_tree_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\[1\] into a buffer of \[4\]"):
        copy_tree([torch.zeros(4)], [torch.ones(1)])
    with pytest.raises(ValueError):
        copy_tree([torch.zeros(4)], [torch.zeros(4), torch.zeros(4)])


def test_poison_reaches_every_buffer() -> None:
    buffers = Buffers(CPU)
    buffers.like("pair", pair())
    buffers.zeros("pixels", (3,), torch.uint8)
    buffers.poison()
    assert bool(buffers["pair.left.0"].isnan().all()) and bool(buffers["pair.right.0"].isnan().all())
    assert buffers["pixels"].tolist() == [255] * 3


def test_close_lets_go() -> None:
    buffers = Buffers(CPU)
    buffers.zeros("x", (2,), torch.float32)
    buffers.close()
    assert len(buffers) == 0 and buffers.size_bytes == 0


def test_map_names_paths() -> None:
    names: list[str] = []
    map_tensors(lambda name, _: names.append(name), pair(), "p")
    assert names == ["p.left.0", "p.right.0"]


def test_eager_runs_the_callable_itself_and_not_before_it_is_asked() -> None:
    calls: list[int] = []
    graphs = Graphs(CPU, capture=False)
    work = graphs.add(lambda: calls.append(1))
    assert calls == [] and not graphs.captured
    work()
    work()
    assert calls == [1, 1] and len(graphs) == 0
    graphs.close()


def test_capture_on_a_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="cpu"):
        Graphs(CPU, capture=True)


def test_how_a_callable_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls to torch.cuda, stood in for: what the side stream keeps is made first; warm up and capture on
    it, after what came before, in one pool for all graphs, the generator made known to each outside inference
    mode, and no further call of the callable."""
    events: list[str] = []
    modes: list[bool] = []
    fake = mock.MagicMock()
    fake.Stream.return_value.wait_stream = lambda other: events.append("side waits")
    fake.current_stream.return_value.wait_stream = lambda other: events.append("current waits")
    fake.graph.return_value.__enter__ = lambda *_: events.append("capture")
    fake.graph.return_value.__exit__ = lambda *_: events.append("end")
    register = fake.CUDAGraph.return_value.register_generator_state
    register.side_effect = lambda _: modes.append(torch.is_inference_mode_enabled())
    fake.use_mem_pool.return_value.__enter__ = lambda *_: events.append("into the pool")
    fake.use_mem_pool.return_value.__exit__ = lambda *_: events.append("out of it")
    used = ("Stream", "current_stream", "stream", "graph", "CUDAGraph", "MemPool", "use_mem_pool", "device")
    for name in (*used, "default_generators"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: events.append(name))
    monkeypatch.setattr(capture, "make_workspace", lambda stream: events.append("workspace"))
    graphs = Graphs(GPU, capture=True)
    with torch.inference_mode():
        replays = [graphs.add(lambda: events.append("work"), warm=warm) for warm in (True, False)]
    captured = ["capture", "work", "end", "current waits"]
    begin = ["empty_cache", "side waits"]
    warmed = ["into the pool", "work", "out of it"]
    assert events == ["workspace", *begin, *warmed, *captured, *begin, *captured]
    assert modes == [False, False]
    pools = {call.kwargs["pool"] for call in fake.graph.call_args_list}
    assert pools == {fake.MemPool.return_value.id} and fake.MemPool.call_count == 1
    assert fake.use_mem_pool.call_args.args[0] is fake.MemPool.return_value
    streams = {call.kwargs["stream"] for call in fake.graph.call_args_list}
    assert streams == {fake.Stream.return_value}
    del events[:]
    for replay in replays:
        replay()
    assert events == [] and fake.CUDAGraph.return_value.replay.call_count == 2 == len(graphs)
    graphs.close()
    graphs.close()
    assert events == ["synchronize", "empty_cache"] and len(graphs) == 0
    assert fake.CUDAGraph.return_value.reset.call_count == 2


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """On the GPU; closed after the test, whose graphs do not outlive it, however it ends."""
    made = Graphs(GPU, capture=True)
    yield made
    made.close()
    gc.collect()


@pytest.mark.gpu
def test_captured_equals_eager_over_the_same_buffers(graphs: Graphs) -> None:
    buffers = Buffers(GPU)
    x, y = (buffers.zeros(name, (256, 256), torch.float32) for name in "xy")

    def square() -> None:
        y.copy_(x @ x)

    def double() -> None:
        y.mul_(2)

    first, second = graphs.add(square), graphs.add(double)
    for seed in range(3):
        value = torch.randn(256, 256, device=GPU, generator=torch.Generator(GPU).manual_seed(seed))
        x.copy_(value)
        square()
        double()
        eager = y.clone()
        buffers.poison()
        x.copy_(value)
        first()
        second()
        assert torch.equal(y, eager)
    assert len(graphs) == 2
    graphs.close()
    graphs.close()
    assert len(graphs) == 0


@pytest.mark.gpu
def test_captures_in_inference_mode_and_outside_it(graphs: Graphs) -> None:
    x = Buffers(GPU).zeros("x", (4,), torch.float32)
    replays = []
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            replays.append(graphs.add(lambda: x.add_(1)))
    x.zero_()
    for replay in replays:
        replay()
    assert x.tolist() == [3] * 4


@pytest.mark.gpu
def test_the_graphs_share_one_pool_and_close_returns_it(graphs: Graphs) -> None:
    buffers = Buffers(GPU)
    x = buffers.zeros("x", (64 << 20,), torch.float32)  # 256 MiB, as is every temporary below
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(GPU)
    for _ in range(4):
        graphs.add(lambda: x.copy_(x.sin().cos()))
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(GPU) - before
    assert 0 < held <= 3 * x.nbytes, "four graphs hold the temporaries of one"
    graphs.close()
    assert torch.cuda.memory_reserved(GPU) <= before


@pytest.mark.gpu
def test_what_is_captured_later_warms_up_in_the_memory_of_what_was_before(graphs: Graphs) -> None:
    buffers = Buffers(GPU)
    x = buffers.zeros("x", (64 << 20,), torch.float32)
    graphs.add(lambda: x.copy_(x.sin().cos()))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    graphs.add(lambda: x.copy_(x.cos().sin()))
    assert torch.cuda.max_memory_reserved(GPU) == held


@pytest.mark.gpu
def test_one_graph_leaves_a_tensor_to_the_next_and_a_third_has_its_memory(graphs: Graphs) -> None:
    """As a chunk's decoding leaves what the VAE remembers."""
    x = Buffers(GPU).zeros("x", (64 << 20,), torch.float32)
    left: list[Tensor] = []

    def leave(factor: float) -> None:
        left.clear()
        left.append(x * factor)

    first, second = graphs.add(lambda: leave(3)), graphs.add(lambda: x.copy_(left[0] + 1))
    left.clear()
    held = torch.cuda.memory_reserved(GPU)
    third = graphs.add(lambda: leave(5))
    assert torch.cuda.memory_reserved(GPU) <= held
    x.fill_(1)
    for _ in range(2):  # 1 -> 4 -> 13, whatever the third leaves in that memory
        first()
        second()
        third()
    assert x[0].item() == 13 and x[-1].item() == 13
    left.clear()


@pytest.mark.gpu
def test_graphs_that_nobody_closes_do_not_end_the_process() -> None:
    """A pool that is destroyed before its graphs aborts: whoever holds a graph holds the pool."""
    code = """
import torch
from flashtalk_rt.graphs.capture import Graphs
x = torch.zeros(1 << 20, device="cuda")
def make():
    graphs = Graphs(torch.device("cuda", 0), capture=True)
    return graphs.add(lambda: x.copy_(x + 1)), graphs
replay, graphs = make()
del graphs
replay()
kept, unclosed = make()
kept.myself = unclosed.myself = (kept, unclosed)
kept()
print(x[0].item())
"""
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "4.0\n"), ran.stderr

"""The engine's stages captured as CUDA graphs: the eager bits, flat memory, prompt interrupts."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from plain_loop import Inputs, plain_chunk, run_chunk
from streams import CHUNK, frames_of, portrait, push, speech
from torch import Tensor

from flashtalk_rt.modules.model import Model
from flashtalk_rt.runtime import Engine


def gpu_model() -> Model:
    """The tiny random model on the GPU."""
    torch.manual_seed(0)
    model = tiny.model()
    for network in model.networks():
        network.to("cuda")
    return model


@pytest.fixture
def gpu_engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines of the tiny model on the GPU; closed after the test, whose graphs do not outlive it,
    however it ends."""
    with contextlib.ExitStack() as made:

        def make(**settings: Any) -> Engine:
            engine = Engine(gpu_model(), **settings)
            made.callback(engine.close)
            return engine

        yield make
    gc.collect()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_captured_equals_eager_bit_for_bit(
    steps: int, precision: Any, gpu_engine: Callable[..., Engine]
) -> None:
    audio = speech(3 * CHUNK)
    results = []
    for capture in (True, False):
        engine = gpu_engine(steps=steps, precision=precision, height=64, width=48, capture=capture)
        results.append(frames_of(push(engine.session(portrait(), seed=3), audio)))
        assert engine._stages is not None and len(engine._stages.graphs) == (steps + 13 if capture else 0)
        engine.close()
    assert torch.equal(*results)


@pytest.mark.gpu
def test_captured_is_the_plain_loop(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=2, precision="bf16", height=64, width=48)
    inputs = Inputs(engine)
    motion, windows = inputs.constants.first_motion.float(), inputs.windows()
    made = run_chunk(engine, inputs, motion, windows, 0)
    expected = plain_chunk(engine, inputs.constants, motion, windows, inputs.noise(0))
    assert torch.equal(made.latent, expected[0])


@pytest.mark.gpu
def test_a_new_picture_prompt_or_seed_captures_nothing(
    monkeypatch: pytest.MonkeyPatch, gpu_engine: Callable[..., Engine]
) -> None:
    engine = gpu_engine(steps=2, precision="bf16", height=64, width=48)
    push(engine.session(portrait(0), prompt="a", seed=0), speech(CHUNK))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    sessions = [engine.session(portrait(i), prompt="b" * i, seed=i) for i in range(3)]
    alternating = [[], [], []]  # type: list[list[Chunk]]
    for turn in range(2):
        for i, session in enumerate(sessions):
            alternating[i] += push(session, speech(CHUNK, seed=10 * i + turn))
    for i in range(3):
        alone = engine.session(portrait(i), prompt="b" * i, seed=i)
        expected = push(alone, *(speech(CHUNK, seed=10 * i + turn) for turn in range(2)))
        assert torch.equal(frames_of(alternating[i]), frames_of(expected))


@pytest.mark.gpu
def test_a_thousand_chunks_at_flat_memory(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=1, precision="bf16", height=64, width=48)
    session = engine.session(portrait())
    audio = speech(CHUNK)
    held_bytes = []
    for chunk in range(1000):
        push(session, audio)
        if chunk in (9, 999):
            torch.cuda.synchronize()
            held_bytes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held_bytes[0] == held_bytes[1]


@pytest.mark.gpu
def test_frames_leave_before_the_decode_ends(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=1, precision="fp32", height=768, width=448)
    session = engine.session(portrait())
    push(session, speech(CHUNK))
    (chunk,) = push(session, speech(CHUNK, seed=1))
    ms = chunk.timings_ms
    assert chunk.frames.is_pinned()
    assert ms["first_frame"] < ms["last_frame"] - ms["vae_decode"] / 2


@pytest.mark.gpu
def test_an_interrupt_waits_for_one_step_at_most(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=50, precision="fp32", height=256, width=256)
    session = engine.session(portrait())
    push(session, speech(CHUNK))  # captured
    assert engine._stages is not None
    replays = 0
    steps = engine._stages._steps

    def counted(step: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            nonlocal replays
            replays += 1
            if replays == 7:
                session.interrupt()
            step()

        return replay

    engine._stages._steps = [counted(step) for step in steps]
    session.push_audio(speech(CHUNK))
    assert list(session) == [] and replays == 7


@pytest.mark.gpu
def test_two_engines_capture_in_two_threads(gpu_engine: Callable[..., Engine]) -> None:
    engines = [gpu_engine(steps=2, precision="bf16", height=64, width=48) for _ in range(2)]
    sessions = [engine.session(portrait(), seed=3) for engine in engines]
    made: dict[int, Tensor] = {}

    def work(i: int) -> None:
        made[i] = frames_of(push(sessions[i], speech(2 * CHUNK)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(made[0], made[1])

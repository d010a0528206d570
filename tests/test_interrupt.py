"""Interrupting a stream: how soon it stops, what is dropped and what is kept."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from streams import (
    CHUNK,
    frames_of,
    gpu_model,
    on_latent_frame,
    on_step,
    portrait,
    push,
    run,
    small_engine,
    speech,
)
from torch import Tensor

from flashtalk_rt.runtime import Chunk, Engine
from flashtalk_rt.runtime.timing import StageClock


@pytest.mark.parametrize("at", [1, 3, 6])
def test_interrupt_stops_within_one_step(at: int) -> None:
    engine = small_engine(steps=6)
    session = engine.session(portrait())
    steps = on_step(engine, lambda step: session.interrupt() if step == at else None)
    session.push_audio(speech(3 * CHUNK))
    assert list(session) == []
    assert steps() == at
    assert list(session) == [] and steps() == at, "the queued audio was dropped"
    chunks = run(session, speech(CHUNK + 640))
    assert [chunk.index for chunk in chunks] == [0, 1]
    assert frames_of(chunks).shape[0] == 29


def test_interrupt_while_the_stages_are_made_begins_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(steps=2)
    session = engine.session(portrait())
    prepare = engine._prepare
    begun: list[int] = []

    def interrupted(*given: Any) -> Any:
        stages = prepare(*given)
        monkeypatch.setattr(stages, "_steps", [lambda step=step: begun.append(step) for step in range(2)])
        session.interrupt()
        return stages

    monkeypatch.setattr(engine, "_prepare", interrupted)
    assert push(session, speech(CHUNK)) == [] and begun == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_interrupt_takes_back_latent_frames_not_yet_decoded(at: int, device: str) -> None:
    """Neither those nor the chunk's encoding are begun; the next chunk is as after an interrupted step."""
    engine, straight = (
        small_engine() if device == "cpu" else Engine(gpu_model(), 1, "fp32", 64, 64) for _ in range(2)
    )
    session = engine.session(portrait())
    push(session, speech(CHUNK))
    stages = engine._stages
    assert stages is not None
    encoded: list[int] = []
    encode = stages._encode
    stages._encode = lambda: (encoded.append(1), encode())[1]
    frames = on_latent_frame(stages, lambda frame: session.interrupt() if frame == at else None)
    session.push_audio(speech(2 * CHUNK, seed=1))
    assert list(session) == []
    assert frames() == at and encoded == []
    (after,) = push(session, speech(CHUNK, seed=2))
    assert after.index == 1 and frames() == at + 9 and encoded == [1]

    other = straight.session(portrait())
    push(other, speech(CHUNK))
    assert straight._stages is not None
    (step,) = straight._stages._steps
    straight._stages._steps = [lambda: (step(), other.interrupt())[0]]
    other.push_audio(speech(2 * CHUNK, seed=1))
    assert list(other) == []
    straight._stages._steps = [step]
    (expected,) = push(other, speech(CHUNK, seed=2))
    assert torch.equal(after.frames, expected.frames)
    engine.close()
    straight.close()


def test_interrupt_from_another_thread() -> None:
    engine = small_engine(steps=200)
    session = engine.session(portrait())
    started = threading.Event()
    steps = on_step(engine, lambda _: started.set())
    at_interrupt: list[int] = []

    def stop() -> None:
        started.wait(60)
        session.interrupt()
        at_interrupt.append(steps())

    thread = threading.Thread(target=stop)
    thread.start()
    session.push_audio(speech(2 * CHUNK))
    chunks = list(session)
    thread.join()
    assert chunks == []
    assert steps() <= at_interrupt[0] + 1 < 200


def test_what_an_interrupt_dropped_was_never_said() -> None:
    """After an interrupt the stream goes on from its last finished chunk: the same audio ring and the
    same motion; only the noise has been drawn further."""
    engine = small_engine(steps=2)
    seen: list[tuple[Tensor, Tensor]] = []
    run_chunk = engine.run_chunk

    def spy(constants: object, motion: Tensor, windows: Tensor, *rest: object) -> object:
        seen.append((motion.clone(), windows.clone()))
        return run_chunk(constants, motion, windows, *rest)  # type: ignore[arg-type]

    engine.run_chunk = spy  # type: ignore[assignment, method-assign]
    session = engine.session(portrait())
    push(session, speech(CHUNK))
    steps = on_step(engine, lambda step: session.interrupt() if step == 1 else None)
    session.push_audio(speech(CHUNK, seed=1))
    assert list(session) == [] and steps() == 1
    push(session, speech(CHUNK, seed=2))

    straight = engine.session(portrait())
    push(straight, speech(CHUNK), speech(CHUNK, seed=2))
    (_, dropped, resumed, _, expected) = seen
    assert torch.equal(resumed[0], expected[0]) and torch.equal(resumed[1], expected[1])
    assert not torch.equal(dropped[1], expected[1])


def test_interrupt_between_chunks_keeps_the_finished_ones() -> None:
    engine = small_engine()
    session = engine.session(portrait())
    session.push_audio(speech(3 * CHUNK))
    chunks = iter(session)
    assert next(chunks).index == 0
    session.interrupt()
    assert list(chunks) == []
    (after,) = push(session, speech(CHUNK))
    assert after.index == 1


def test_audio_pushed_after_an_interrupt_is_kept() -> None:
    """A listener interrupts an idle stream and speaks at once: nobody iterated in between."""
    engine = small_engine()
    session = engine.session(portrait())
    session.push_audio(speech(CHUNK))
    session.interrupt()
    session.push_audio(speech(CHUNK, seed=1))
    (chunk,) = list(session)
    assert torch.equal(chunk.audio, speech(CHUNK, seed=1))


def test_audio_pushed_after_an_interrupt_mid_chunk_is_kept() -> None:
    engine = small_engine(steps=3)
    session = engine.session(portrait())

    def barge_in(step: int) -> None:
        if step == 1:
            session.interrupt()
            session.push_audio(speech(CHUNK, seed=1))

    on_step(engine, barge_in)
    session.push_audio(speech(2 * CHUNK))
    chunks = [*session, *session]
    assert [chunk.index for chunk in chunks] == [0]
    assert torch.equal(chunks[0].audio, speech(CHUNK, seed=1))


def test_two_threads_that_iterate_one_stream_share_its_chunks() -> None:
    engine = small_engine(steps=2)
    audio = speech(6 * CHUNK)
    expected = frames_of(run(engine.session(portrait()), audio))
    session = engine.session(portrait())
    session.push_audio(audio)
    session.end_audio()
    made: list[Chunk] = []
    threads = [threading.Thread(target=lambda: made.extend(session)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.sort(key=lambda chunk: chunk.index)
    assert [chunk.index for chunk in made] == list(range(6))
    assert torch.equal(frames_of(made), expected)
    assert torch.equal(torch.cat([chunk.audio for chunk in made]), audio)


def test_an_interrupt_stops_the_thread_that_waits_too() -> None:
    engine = small_engine(steps=200)
    session = engine.session(portrait())
    started = threading.Event()
    on_step(engine, lambda _: started.set())
    session.push_audio(speech(4 * CHUNK))
    made: list[Chunk] = []
    threads = [threading.Thread(target=lambda: made.extend(session)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(60)
    session.interrupt()
    for thread in threads:
        thread.join(60)
    assert made == [] and not any(thread.is_alive() for thread in threads)


def test_an_interrupt_while_the_chunk_is_waited_for_drops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, its encoding still runs then."""
    engine = small_engine()
    session = engine.session(portrait())
    waited = StageClock.timings_ms

    def interrupted(clock: StageClock) -> dict[str, float]:
        session.interrupt()
        return waited(clock)

    monkeypatch.setattr(StageClock, "timings_ms", interrupted)
    assert push(session, speech(2 * CHUNK)) == []
    monkeypatch.undo()
    assert [chunk.index for chunk in push(session, speech(CHUNK))] == [0]

"""What an engine overlaps: the next chunk's audio is heard ahead, the first frames leave early."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import tiny
import torch
from streams import CHUNK, frames_of, portrait, push, speech
from torch import Tensor

from flashtalk_rt.runtime import Engine
from flashtalk_rt.runtime.lane import Lane
from flashtalk_rt.runtime.timing import StageClock


def ahead_engine(steps: int = 2) -> Engine:
    """On the CPU nothing overlaps, so nothing is heard ahead; here it is, in order."""
    engine = Engine(tiny.model(), steps=steps, precision="fp32", height=16, width=16)
    engine.hears_ahead = True
    return engine


@pytest.mark.parametrize("steps", [1, 2])
def test_hearing_ahead_changes_nothing(steps: int) -> None:
    engine = ahead_engine(steps)
    audio = speech(3 * CHUNK + 1000)
    features = engine.audio_features
    heard: list[int] = []
    engine.audio_features = lambda ring: heard.append(1) or features(ring)  # type: ignore[assignment,method-assign]
    session = engine.session(portrait(), seed=1)
    session.push_audio(audio)
    session.end_audio()
    chunks = iter(session)
    ahead = [next(chunks)]
    assert len(heard) == 2, "the second chunk was heard while the first was made"
    ahead += chunks
    assert len(heard) == 4
    engine.hears_ahead = False
    straight = engine.session(portrait(), seed=1)
    straight.push_audio(audio)
    straight.end_audio()
    expected = list(straight)
    assert torch.equal(frames_of(ahead), frames_of(expected))
    assert [len(c.frames) for c in ahead] == [28, 28, 28, 2]
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(ahead, expected, strict=True))


@pytest.mark.parametrize("at", [1, 2])
def test_what_was_heard_ahead_is_dropped_by_an_interrupt(at: int) -> None:
    """The first step comes before hearing ahead, the second after it."""
    engine = ahead_engine(steps=3)
    session = engine.session(portrait())
    count = 0

    def barge_in(*_: object) -> None:
        nonlocal count
        count += 1
        if count == at:
            session.interrupt()
            session.push_audio(speech(CHUNK, seed=9))

    hook = engine.model.dit.register_forward_hook(barge_in)
    session.push_audio(speech(3 * CHUNK))
    chunks = [*session, *session]
    hook.remove()
    assert [chunk.index for chunk in chunks] == [0]
    assert torch.equal(chunks[0].audio, speech(CHUNK, seed=9))


def test_an_interrupt_between_chunks_drops_what_was_heard_ahead() -> None:
    engine = ahead_engine()
    session = engine.session(portrait())
    session.push_audio(speech(3 * CHUNK))
    chunks = iter(session)
    next(chunks)
    session.interrupt()
    assert list(chunks) == []
    (after,) = push(session, speech(CHUNK, seed=5))
    assert torch.equal(after.audio, speech(CHUNK, seed=5))


def test_close_while_hearing_ahead() -> None:
    engine = ahead_engine()
    session = engine.session(portrait())
    features = engine.audio_features
    calls: list[int] = []

    def closing(ring: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            session.close()
        return features(ring)

    engine.audio_features = closing  # type: ignore[method-assign]
    session.push_audio(speech(3 * CHUNK))
    assert list(session) == [] and len(calls) == 2
    assert session._ahead is None, "closed: it holds nothing any more"


def test_hearing_ahead_has_the_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = mock.Mock()
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    device = torch.device("cuda", 0)
    for priority in (-1, 0):
        Lane(device, priority)
    assert stream.call_args_list == [mock.call(device, -1), mock.call(device, 0)]


def test_first_frame_comes_before_the_last_and_both_within_the_chunk() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=32, width=32)
    (chunk,) = push(engine.session(portrait()), speech(CHUNK))
    ms = chunk.timings_ms
    assert ms["audio"] + ms["dit"] < ms["first_frame"]
    # Three of nine latent frames are decoded by then.
    assert ms["last_frame"] - ms["first_frame"] > ms["vae_decode"] / 3
    stages = ("audio", "dit", "vae_decode", "color")
    assert sum(ms[name] for name in stages) <= ms["last_frame"] * 1.001


def test_a_clock_adds_the_parts_of_a_stage() -> None:
    clock = StageClock(torch.device("cpu"))
    for _ in range(2):
        with clock.stage("dit"):
            threading.Event().wait(0.02)
    clock.mark("last_frame")
    ms = clock.timings_ms()
    assert 40 <= ms["dit"] <= ms["last_frame"]

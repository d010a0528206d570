"""The engine's stages over static buffers: exactly the plain loop, whatever ran before."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.config import Precision
from flashtalk_rt.errors import InputError
from flashtalk_rt.graphs.buffers import tensors
from flashtalk_rt.modules.chunk import denoise, predict
from flashtalk_rt.modules.model import Model
from flashtalk_rt.runtime import Chunk, Engine, Session
from flashtalk_rt.runtime.engine import vae_dtype
from flashtalk_rt.runtime.lane import Lane
from flashtalk_rt.runtime.stages import Constants, Generated
from flashtalk_rt.runtime.timing import StageClock

FRAME = 640  # samples
CHUNK = 28 * FRAME


def portrait(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (64, 80, 3), dtype=np.uint8)


def speech(samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def image(seed: int, height: int, width: int) -> Tensor:
    return torch.rand(1, 3, 1, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Inputs:
    """What a session gives the engine, made up: constants of one image, windows and noise by seed."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        config = engine.model.dit.config
        text = torch.randn(1, 3, config.text_dim, generator=draw)
        features = torch.randn(1, 5, config.image_dim, generator=draw)
        picture = image(seed, engine.height, engine.width)
        device = engine.device
        self.constants = engine.constants(picture.to(device), text.to(device), features.to(device))
        self._draw, self._engine = draw, engine
        frames = engine.model.stream.frames
        self._windows = (1, frames, config.audio_window, config.audio_blocks, config.audio_dim)

    def windows(self) -> Tensor:
        return torch.randn(self._windows, generator=self._draw).to(self._engine.device)

    def noise(self, seed: int) -> Callable[[], Tensor]:
        draw, shape = torch.Generator().manual_seed(seed), self._engine.latent_shape()
        return lambda: torch.randn(shape, generator=draw).to(self._engine.device)


@torch.inference_mode()
def plain_chunk(
    engine: Engine, constants: Constants, motion: Tensor, windows: Tensor, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chunk as a straightforward loop, all frames decoded and matched at once: latent, frames, motion
    and pixels, as in `Generated`."""
    model, stream = engine.model, engine.model.stream
    steps = denoise(
        model.dit,
        constants.reference,
        model.dit.audio_context(windows),
        motion,
        engine.times,
        stream.sampler,
        noise,
    )
    latent = deque(steps, maxlen=1).pop()
    frames = model.vae.decode(latent).float().clamp(-1, 1)
    color = constants.color
    frames = ops.color_match(frames, color.mean, color.std, color.strength)
    motion = model.vae.encode(frames[:, :, -stream.motion_frames :]).float()
    frames = frames[:, :, stream.motion_frames :]
    pixels = ((frames[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu()
    return latent, frames, motion, pixels


def run_chunk(
    engine: Engine, inputs: Inputs, motion: Tensor, windows: Tensor, seed: int, **more: Any
) -> Generated:
    made = engine.run_chunk(
        inputs.constants,
        motion,
        windows,
        inputs.noise(seed),
        lambda: False,
        StageClock(engine.device),
        **more,
    )
    assert made is not None
    return made


def assert_equals_the_loop(engine: Engine, chunks: int = 3) -> None:
    inputs = Inputs(engine)
    motion = loop_motion = inputs.constants.first_motion.float()
    for chunk in range(chunks):
        windows = inputs.windows()
        made = run_chunk(engine, inputs, motion, windows, chunk)
        expected = plain_chunk(engine, inputs.constants, loop_motion, windows, inputs.noise(chunk))
        got = (made.latent, made.frames, made.motion, made.pixels)
        for name, mine, theirs in zip(("latent", "frames", "motion", "pixels"), got, expected, strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), (chunk, name)
        motion, loop_motion = made.motion, expected[2]


def test_guidance_goes_beyond_what_the_audio_changes() -> None:
    model = tiny.model(audio_guidance=1.5, guided_below=0.6)
    inputs = Inputs(Engine(model, precision="fp32"))
    reference, windows = inputs.constants.reference, inputs.windows()
    latent = inputs.noise(0)()
    plain = dataclasses.replace(reference, unheard=None)
    with torch.inference_mode():
        heard, none = (
            predict(model.dit, latent, 0.5, plain, model.dit.audio_context(x))
            for x in (windows, torch.zeros_like(windows))
        )
        guided = predict(model.dit, latent, 0.5, reference, model.dit.audio_context(windows))
        early = predict(model.dit, latent, 0.7, reference, model.dit.audio_context(windows))
        alone = predict(model.dit, latent, 0.7, plain, model.dit.audio_context(windows))
    assert not torch.equal(heard, none)
    torch.testing.assert_close(guided, none + 1.5 * (heard - none))
    assert torch.equal(early, alone), "above the level it is one pass"
    assert Inputs(Engine(tiny.model(), precision="fp32")).constants.reference.unheard is None, "off: one pass"


def test_a_guided_engine_equals_the_loop() -> None:
    assert_equals_the_loop(Engine(tiny.model(audio_guidance=2.0, guided_below=0.9), precision="fp32"))


def frames_of(chunks: list[Chunk]) -> Tensor:
    return torch.cat([chunk.frames for chunk in chunks])


def run(session: Session, *blocks: Tensor) -> list[Chunk]:
    chunks: list[Chunk] = []
    for block in blocks:
        session.push_audio(block)
        chunks += session
    return chunks


# --- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 80)])
def test_a_chunk_is_bit_for_bit_the_plain_loop(height: int, width: int, precision: Any, sampler: str) -> None:
    model = tiny.model(sampler=sampler)
    assert_equals_the_loop(Engine(model, steps=2, precision=precision, height=height, width=width))


@pytest.mark.parametrize("stream", [{"color_strength": 0.0}, {"frames": 17, "motion_frames": 9}], ids=str)
def test_other_streams_are_the_plain_loop_too(stream: dict[str, Any]) -> None:
    assert_equals_the_loop(Engine(tiny.model(**stream), steps=1, precision="fp32", height=32, width=16))


def test_nothing_is_read_before_it_is_written() -> None:
    """NaN in every static buffer between two chunks changes nothing, once the session is laid in again."""
    engine = Engine(tiny.model(), steps=2, precision="fp32", height=16, width=16)
    inputs = Inputs(engine)
    windows, motion = inputs.windows(), inputs.constants.first_motion.float()
    clean = run_chunk(engine, inputs, motion, windows, 0)
    frames = clean.frames.clone()
    assert engine._stages is not None
    with torch.inference_mode():
        engine._stages.buffers.poison()
    again = dataclasses.replace(inputs.constants)  # equal values, but not the active session's
    inputs.constants = again
    poisoned = run_chunk(engine, inputs, motion, windows, 0)
    assert torch.equal(poisoned.latent, clean.latent) and torch.equal(poisoned.frames, frames)
    assert torch.equal(poisoned.motion, clean.motion) and torch.equal(poisoned.pixels, clean.pixels)


def test_pixels_and_latents_outlive_the_next_chunk() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    inputs = Inputs(engine)
    made = run_chunk(engine, inputs, inputs.constants.first_motion.float(), inputs.windows(), 0)
    kept = [made.latent.clone(), made.motion.clone(), made.pixels.clone()]
    run_chunk(engine, inputs, made.motion, inputs.windows(), 1)
    assert all(torch.equal(*both) for both in zip(kept, (made.latent, made.motion, made.pixels), strict=True))


# --- prepared once ---------------------------------------------------------------------------------


def test_another_session_uses_the_same_stages_and_buffers() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    run(engine.session(portrait(0), prompt="a", seed=0), speech(CHUNK))
    stages = engine._stages
    assert stages is not None
    before = {i: t.data_ptr() for i, t in enumerate(tensors(list(stages.buffers._buffers.values())))}
    run(engine.session(portrait(1), prompt="another one", seed=7), speech(CHUNK, seed=1))
    assert engine._stages is stages
    assert before == {i: t.data_ptr() for i, t in enumerate(tensors(list(stages.buffers._buffers.values())))}


def test_constants_of_another_shape_are_served_by_new_stages() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    inputs = Inputs(engine)
    motion, windows = inputs.constants.first_motion.float(), inputs.windows()
    run_chunk(engine, inputs, motion, windows, 0)
    first = engine._stages
    features = torch.randn(1, 9, engine.model.dit.config.image_dim)  # 9 image tokens, not 5
    text = torch.randn(1, 3, engine.model.dit.config.text_dim)
    inputs.constants = engine.constants(image(5, 16, 16), text, features)
    made = run_chunk(engine, inputs, motion, windows, 0)
    assert first is not None and engine._stages is not first and len(first.buffers) == 0
    expected = plain_chunk(engine, inputs.constants, motion, windows, inputs.noise(0))
    assert torch.equal(made.pixels, expected[3])


def test_a_closed_sessions_constants_are_not_kept() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    session = engine.session(portrait())
    run(session, speech(CHUNK))
    stages = engine._stages
    assert stages is not None and stages._active() is not None
    session.close()
    gc.collect()
    assert stages._active() is None


def test_close_releases_and_refuses() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    session = engine.session(portrait())
    run(session, speech(CHUNK))
    stages = engine._stages
    assert stages is not None
    engine.close()
    engine.close()
    assert len(stages.buffers) == 0 and engine._stages is None
    session.push_audio(speech(CHUNK))
    with pytest.raises(InputError, match="closed"):
        list(session)
    with pytest.raises(InputError, match="closed"):
        engine.session(portrait())


def test_nothing_holds_a_graph_when_the_graphs_are_closed() -> None:
    engine = Engine(tiny.model(), steps=2, precision="fp32", height=16, width=16)
    run(engine.session(portrait()), speech(CHUNK))
    stages = engine._stages
    assert stages is not None
    works = [stages._audio_context, *stages._steps, stages._encode]
    works += [stages._blocks[0].decode, stages._blocks[1].decode, *(b.color for b in stages._blocks)]
    held = [weakref.ref(work) for work in works]
    del works
    alive: list[object] = []
    stages.graphs.close = lambda: alive.extend(ref() for ref in held)  # type: ignore[method-assign]
    engine.close()
    assert len(alive) == 15 and not any(alive)


def test_capture_on_a_cpu_is_refused() -> None:
    with pytest.raises(InputError, match=r"capture is True.*cpu"):
        Engine(tiny.model(), capture=True)
    for eager in (None, False):
        assert not Engine(tiny.model(), capture=eager).capture


def test_a_model_converted_under_an_engine_is_refused() -> None:
    model = tiny.model()
    engine = Engine(model, steps=1, precision="fp32", height=16, width=16)
    session = engine.session(portrait())
    Engine(model, steps=1, precision="bf16", height=16, width=16)
    session.push_audio(speech(CHUNK))
    with pytest.raises(InputError, match="load the model once for every precision"):
        list(session)


def test_threads_take_turns() -> None:
    engine = Engine(tiny.model(), steps=2, precision="fp32", height=16, width=16)
    audio = [speech(2 * CHUNK, seed=i) for i in range(2)]
    alone = [frames_of(run(engine.session(portrait(i), seed=i), audio[i])) for i in range(2)]
    together: dict[int, Tensor] = {}
    sessions = [engine.session(portrait(i), seed=i) for i in range(2)]

    def work(i: int) -> None:
        together[i] = frames_of(run(sessions[i], audio[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[i], alone[i]) for i in range(2))


# --- what overlaps ---------------------------------------------------------------------------------


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
    (after,) = run(session, speech(CHUNK, seed=5))
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
    next(iter(session))
    assert session._ahead is None, "closed: it holds nothing any more"
    assert list(session) == [] and len(calls) == 2


def test_hearing_ahead_has_the_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = mock.Mock()
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    device = torch.device("cuda", 0)
    for priority in (-1, 0):
        Lane(device, priority)
    assert stream.call_args_list == [mock.call(device, -1), mock.call(device, 0)]


def test_first_frame_comes_before_the_last_and_both_within_the_chunk() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=32, width=32)
    (chunk,) = run(engine.session(portrait()), speech(CHUNK))
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


# --- captured ---------------------------------------------------------------------------------------


def gpu_model(**stream: object) -> Model:
    """The tiny random model on the GPU."""
    torch.manual_seed(0)
    model = tiny.model(**stream)
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
        results.append(frames_of(run(engine.session(portrait(), seed=3), audio)))
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
    run(engine.session(portrait(0), prompt="a", seed=0), speech(CHUNK))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    sessions = [engine.session(portrait(i), prompt="b" * i, seed=i) for i in range(3)]
    alternating = [[], [], []]  # type: list[list[Chunk]]
    for turn in range(2):
        for i, session in enumerate(sessions):
            alternating[i] += run(session, speech(CHUNK, seed=10 * i + turn))
    for i in range(3):
        alone = engine.session(portrait(i), prompt="b" * i, seed=i)
        expected = run(alone, *(speech(CHUNK, seed=10 * i + turn) for turn in range(2)))
        assert torch.equal(frames_of(alternating[i]), frames_of(expected))


@pytest.mark.gpu
def test_a_thousand_chunks_at_flat_memory(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=1, precision="bf16", height=64, width=48)
    session = engine.session(portrait())
    audio = speech(CHUNK)
    held_bytes = []
    for chunk in range(1000):
        run(session, audio)
        if chunk in (9, 999):
            torch.cuda.synchronize()
            held_bytes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held_bytes[0] == held_bytes[1]


@pytest.mark.gpu
def test_frames_leave_before_the_decode_ends(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=1, precision="fp32", height=768, width=448)
    session = engine.session(portrait())
    run(session, speech(CHUNK))
    (chunk,) = run(session, speech(CHUNK, seed=1))
    ms = chunk.timings_ms
    assert chunk.frames.is_pinned()
    assert ms["first_frame"] < ms["last_frame"] - ms["vae_decode"] / 2


@pytest.mark.gpu
def test_an_interrupt_waits_for_one_step_at_most(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=50, precision="fp32", height=256, width=256)
    session = engine.session(portrait())
    run(session, speech(CHUNK))  # captured
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
        made[i] = frames_of(run(sessions[i], speech(2 * CHUNK)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("fp32", "cuda", torch.float32),
        ("bf16", "cuda", torch.float16),
        ("fp8", "cuda", torch.float16),
        ("bf16", "cpu", torch.bfloat16),
    ],
)
def test_what_the_vae_computes_in(precision: Precision, device: str, dtype: torch.dtype) -> None:
    assert vae_dtype(precision, torch.device(device)) == dtype

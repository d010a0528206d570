"""A stream's behaviour: determinism, lengths, bad input, isolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from streams import CHUNK, FRAME, frames_of, on_step, portrait, push, run, small_engine, speech
from torch import Tensor

from flashtalk_rt.errors import InputError
from flashtalk_rt.modules.samples import mono_block
from flashtalk_rt.runtime import Chunk, Engine
from flashtalk_rt.runtime.engine import DTYPES


@pytest.fixture(scope="module")
def engine() -> Engine:
    return small_engine()


# --- what comes out --------------------------------------------------------------------------------


def test_the_cut_of_the_audio_does_not_matter(engine: Engine) -> None:
    audio = speech(2 * CHUNK + 5000)
    whole = run(engine.session(portrait(), seed=3), audio)
    assert [chunk.frames.shape[0] for chunk in whole] == [28, 28, 8]
    draw = np.random.default_rng(0)
    for largest in (10, 3000, 50_000):
        cuts = np.unique(np.cumsum(draw.integers(1, largest + 1, len(audio)))).tolist()
        blocks = audio.tensor_split([cut for cut in cuts if cut < len(audio)])
        pieces = run(engine.session(portrait(), seed=3), *blocks)
        assert torch.equal(frames_of(pieces), frames_of(whole))
        assert torch.equal(torch.cat([chunk.audio for chunk in pieces]), audio)


def test_one_sample_at_a_time(engine: Engine) -> None:
    audio = speech(CHUNK + 700)
    session = engine.session(portrait(), seed=3)
    for sample in audio.split(1):
        session.push_audio(sample)
    session.end_audio()
    assert torch.equal(frames_of(list(session)), frames_of(run(engine.session(portrait(), seed=3), audio)))


def test_seed_image_and_audio_each_change_the_frames(engine: Engine) -> None:
    audio = speech(CHUNK)
    base = frames_of(run(engine.session(portrait(), seed=1), audio))
    assert torch.equal(base, frames_of(run(engine.session(portrait(), seed=1), audio)))
    for other in (
        run(engine.session(portrait(), seed=2), audio),
        run(engine.session(portrait(9), seed=1), audio),
        run(engine.session(portrait(), seed=1), speech(CHUNK, seed=5)),
    ):
        assert not torch.equal(base, frames_of(other))


@pytest.mark.parametrize(
    "samples",
    [
        1,
        319,
        320,
        321,
        639,
        640,
        641,
        960,
        16_000,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        CHUNK + 640,
        2 * CHUNK,
        40_001,
    ],
)
def test_the_video_is_as_long_as_the_audio_to_one_frame(engine: Engine, samples: int) -> None:
    audio = speech(samples)
    chunks = run(engine.session(portrait()), audio)
    frames = sum(chunk.frames.shape[0] for chunk in chunks)
    assert frames >= 1 and abs(frames - samples / FRAME) < 1
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert torch.equal(torch.cat([chunk.audio for chunk in chunks]), audio)


def test_a_chunk(engine: Engine) -> None:
    (chunk,) = push(engine.session(portrait()), speech(CHUNK))
    assert chunk.index == 0
    assert chunk.frames.dtype == torch.uint8 and chunk.frames.shape == (28, 16, 16, 3)
    assert chunk.audio.dtype == torch.float32 and chunk.audio.shape == (CHUNK,)
    chunk.frames.fill_(0)  # the caller's to change
    stages = {"audio", "dit", "vae_decode", "color", "vae_encode"}
    assert set(chunk.timings_ms) == stages | {"first_frame", "last_frame"}
    assert all(0 < ms < 60_000 for ms in chunk.timings_ms.values())


def test_silence_works(engine: Engine) -> None:
    chunks = run(engine.session(portrait()), torch.zeros(CHUNK + 3 * FRAME))
    assert frames_of(chunks).shape[0] == 31


def test_nothing_pushed_yields_nothing(engine: Engine) -> None:
    session = engine.session(portrait())
    assert list(session) == []
    session.push_audio(torch.zeros(0))
    session.push_audio(speech(CHUNK - 1))
    assert list(session) == []
    session = engine.session(portrait())
    session.push_audio(torch.zeros(0))
    session.end_audio()
    assert list(session) == []


SAME_AUDIO: dict[str, Callable[[np.ndarray], object]] = {
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "long double": lambda x: x.astype(np.longdouble),
    "big-endian": lambda x: x.astype(">f4"),
    "backwards": lambda x: x[::-1].copy()[::-1],
    "every second": lambda x: np.repeat(x, 2)[::2],
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32),
    "torch float64": lambda x: torch.from_numpy(x).double(),
    "torch, with a gradient": lambda x: torch.from_numpy(x).requires_grad_(),
}


@pytest.mark.parametrize("kind", SAME_AUDIO)
@pytest.mark.filterwarnings("error")
def test_every_float_array_is_the_same_audio(kind: str) -> None:
    audio = speech(1000)
    block = mono_block(SAME_AUDIO[kind](audio.numpy().copy()))
    assert block.dtype == torch.float32 and not block.requires_grad and torch.equal(block, audio)


def test_numpy_and_half(engine: Engine) -> None:
    audio = speech(CHUNK)
    base = frames_of(run(engine.session(portrait()), audio))
    assert torch.equal(base, frames_of(run(engine.session(portrait()), audio.numpy())))  # type: ignore[arg-type]
    for half in (audio.half(), audio.half().numpy()):
        chunks = run(engine.session(portrait()), half)  # type: ignore[arg-type]
        assert chunks[0].audio.dtype == torch.float32


def test_the_largest_samples_do_not_blacken_the_stream(engine: Engine) -> None:
    session = engine.session(portrait())
    (loud,) = push(session, 1e6 * speech(CHUNK).clamp(-1, 1))
    (after,) = push(session, speech(CHUNK))
    assert loud.frames.float().std() > 1 and after.frames.float().std() > 1


def test_the_callers_buffer_may_be_reused(engine: Engine) -> None:
    audio = speech(CHUNK).numpy()
    base = frames_of(run(engine.session(portrait()), torch.from_numpy(audio.copy())))
    session = engine.session(portrait())
    session.push_audio(audio)
    audio[:] = 0
    assert torch.equal(frames_of(list(session)), base)


# --- bad input -------------------------------------------------------------------------------------

BAD_AUDIO: dict[str, tuple[object, str]] = {
    "NaN": (torch.tensor([0.0, float("nan")]), "sample 1 of 2 is nan"),
    "infinity": (np.array([np.inf], dtype=np.float32), "is inf"),
    "too large for float32": (np.array([0, -1e300]), "sample 1 of 2 is -inf"),
    "too large for the loudness": (1e19 * speech(100), r"e\+\d\d; .* at most 1e\+06"),
    "stereo": (torch.zeros(2, 100), r"\[2, 100\]"),
    "a scalar": (torch.tensor(0.5), r"\[\]"),
    "int16": (np.zeros(100, dtype=np.int16), "int16"),
    "complex": (np.zeros(100, dtype=np.complex64), "complex64"),
    "objects": (np.array([0.5, None]), "object"),
    "None": (None, "NoneType"),
    "a string": ("speech.wav", "type str"),
    "bytes": (b"1234", "type bytes"),
    "a list": ([0.5], "type list"),
}


@pytest.mark.parametrize("bad", BAD_AUDIO)
def test_bad_audio_is_refused_and_changes_nothing(engine: Engine, bad: str) -> None:
    samples, named = BAD_AUDIO[bad]
    audio = speech(CHUNK + 2000)
    session = engine.session(portrait())
    session.push_audio(audio[:3000])
    with pytest.raises(InputError, match=named):
        session.push_audio(samples)  # type: ignore[arg-type]
    chunks = run(session, audio[3000:])
    assert torch.equal(frames_of(chunks), frames_of(run(engine.session(portrait()), audio)))


def test_no_audio_after_the_end(engine: Engine) -> None:
    session = engine.session(portrait())
    session.end_audio()
    with pytest.raises(InputError, match="no more audio"):
        session.push_audio(speech(10))


def test_audio_that_comes_while_the_stream_ends_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would lie behind the silence that the stream's end was padded with."""
    session = engine.session(portrait())

    def ending(samples: Tensor) -> Tensor:
        session.end_audio()
        return mono_block(samples)

    monkeypatch.setattr("flashtalk_rt.runtime.session.mono_block", ending)
    with pytest.raises(InputError, match="no more audio"):
        session.push_audio(speech(10))


def test_close(engine: Engine) -> None:
    session = engine.session(portrait())
    session.push_audio(speech(2 * CHUNK))
    next(iter(session))
    session.close()
    session.close()
    assert list(session) == []
    with pytest.raises(InputError, match="closed"):
        session.push_audio(speech(10))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"height": 50}, "height is 50"),
        ({"width": 8}, "width is 8"),
        ({"height": 0}, "height is 0"),
        ({"width": -16}, "width is -16"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": -2}, "steps is -2"),
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number"),
        ({"steps": "4"}, "steps is '4'"),
        ({"height": 64.0}, "height is 64.0"),
        ({"width": "64"}, "width is '64'"),
        ({"precision": "fp4"}, "'fp4'"),
        ({"precision": "FP32"}, "'FP32'"),
        ({"precision": ["fp32"]}, "precision is .'fp32'"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_served_is_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Engine(tiny.model(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, None, 1.5, "7"])
def test_a_seed_that_cannot_be_is_named(engine: Engine, seed: object) -> None:
    with pytest.raises(InputError, match=rf"seed is {seed!r}; it must be"):
        engine.session(portrait(), seed=seed)  # type: ignore[arg-type]


def test_a_prompt_that_is_no_string_is_named(engine: Engine) -> None:
    with pytest.raises(InputError, match="prompt is None; it must be a string"):
        engine.session(portrait(), prompt=None)  # type: ignore[arg-type]


def test_whole_numbers_of_numpy_and_the_largest_seed() -> None:
    two, side = np.int64(2), np.int32(16)
    engine = Engine(tiny.model(), two, "fp32", side, side)  # type: ignore[arg-type]
    chunks = [run(engine.session(portrait(), seed=s), speech(FRAME)) for s in (np.uint8(3), 3)]  # type: ignore[arg-type]
    assert torch.equal(frames_of(chunks[0]), frames_of(chunks[1]))
    engine.session(portrait(), seed=2**63 - 1)


def test_a_picture_of_another_world_is_refused() -> None:
    model = tiny.model()
    model.min_portrait_psnr_db, model.label = 90.0, "toy model"
    with pytest.raises(InputError, match=r"toy model.*90 or more.*--checkpoint"):
        Engine(model, precision="fp32").session(portrait())
    model.min_portrait_psnr_db = 0.1
    Engine(model, precision="fp32").model.check_portrait(torch.zeros(1, 3, 1, 64, 48))


# --- several streams, sizes, precision, label ------------------------------------------------------


def test_two_sessions_of_one_engine_do_not_disturb_each_other(engine: Engine) -> None:
    first, second = speech(3 * CHUNK), speech(3 * CHUNK, seed=1)
    alone = [
        frames_of(push(engine.session(portrait(i), seed=i), audio)) for i, audio in enumerate((first, second))
    ]
    sessions = [engine.session(portrait(i), seed=i) for i in range(2)]
    together: list[list[Chunk]] = [[], []]
    for parts in zip(first.split(CHUNK), second.split(CHUNK), strict=True):
        for i, part in enumerate(parts):
            together[i] += push(sessions[i], part)
    for one, interleaved in zip(alone, together, strict=True):
        assert torch.equal(one, frames_of(interleaved))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 64), (80, 32), (16, 112)])
def test_any_multiple_of_16(height: int, width: int) -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=height, width=width)
    (chunk,) = run(engine.session(portrait()), speech(3 * FRAME))
    assert chunk.frames.shape == (3, height, width, 3)


def test_the_models_own_size_and_steps_are_the_default() -> None:
    engine = Engine(tiny.model(steps=3, height=32, width=48), precision="fp32")
    assert (engine.height, engine.width, engine.steps) == (32, 48, 3)
    steps = on_step(engine, lambda _: None)
    (chunk,) = run(engine.session(portrait()), speech(FRAME))
    assert steps() == 3 and chunk.frames.shape == (1, 32, 48, 3)


def test_bf16_stays_near_fp32() -> None:
    results = []
    for precision in ("fp32", "bf16"):
        # Colour matching would stretch a random decoder's faint picture, and its error with it.
        model = tiny.model(color_strength=0.0)
        engine = Engine(model, steps=2, precision=precision, height=32, width=32)  # type: ignore[arg-type]
        assert engine.model.dit.dtype == DTYPES[precision]  # type: ignore[index]
        (chunk,) = push(engine.session(portrait(), seed=1), speech(CHUNK))
        results.append(chunk.frames.float() - 127.5)
    exact, low = results
    assert 0 < (low - exact).norm() / exact.norm() < 0.05


def test_the_label_is_drawn_in_the_lower_left_only() -> None:
    drawn = []
    for label in ("", "toy model"):
        model = tiny.model()
        model.label = label
        engine = Engine(model, steps=1, precision="fp32", height=64, width=96)
        drawn.append(frames_of(run(engine.session(portrait()), speech(2 * FRAME))).float())
    changed = (drawn[0] - drawn[1]).abs().amax((0, 3)) > 0
    rows, columns = changed.nonzero().unbind(1)
    assert len(rows) > 30, "the label is there"
    assert rows.min() >= 44 and columns.min() >= 1 and columns.max() < 64


def fails_once(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, after_hearing: bool) -> None:
    """The next chunk's work raises, before or after the audio of the one behind it was heard."""
    run_chunk = engine.run_chunk

    def failing(*given: Any) -> Any:
        monkeypatch.setattr(engine, "run_chunk", run_chunk)
        if after_hearing:
            given[-1]()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "run_chunk", failing)


@pytest.mark.parametrize("after_hearing", [False, True])
def test_a_chunk_that_fails_keeps_its_audio(
    after_hearing: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "hears_ahead", True)
    audio = speech(2 * CHUNK + 900)
    expected = run(engine.session(portrait(), seed=3), audio)
    session = engine.session(portrait(), seed=3)
    session.push_audio(audio)
    session.end_audio()
    fails_once(engine, monkeypatch, after_hearing=after_hearing)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(session))
    for found, wanted in zip(session, expected, strict=True):
        assert torch.equal(found.audio, wanted.audio) and torch.equal(found.frames, wanted.frames)


def test_audio_whose_hearing_ahead_fails_is_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "hears_ahead", True)
    audio = speech(2 * CHUNK)
    session = engine.session(portrait())
    session.push_audio(audio)
    features, calls = engine.audio_features, iter(range(9))

    def failing(ring: Tensor) -> Tensor:
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return features(ring)

    monkeypatch.setattr(engine, "audio_features", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(session))
    assert torch.equal(torch.cat([chunk.audio for chunk in session]), audio)


def test_close_drops_the_chunk_that_is_being_made() -> None:
    engine = small_engine(steps=3)
    session = engine.session(portrait())
    steps = on_step(engine, lambda step: session.close())
    session.push_audio(speech(2 * CHUNK))
    assert list(session) == [] and steps() == 1

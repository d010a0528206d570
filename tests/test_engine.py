"""The engine's stages over static buffers: exactly the plain loop, whatever ran before."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from typing import Any

import pytest
import tiny
import torch
from plain_loop import Inputs, assert_equals_the_loop, image, plain_chunk, run_chunk
from streams import CHUNK, frames_of, portrait, push, small_engine, speech
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.config import Precision
from flashtalk_rt.errors import InputError
from flashtalk_rt.graphs.buffers import copy_tree, tensors
from flashtalk_rt.modules.chunk import predict
from flashtalk_rt.modules.vae import VAE
from flashtalk_rt.runtime import Engine
from flashtalk_rt.runtime.engine import DTYPES, vae_dtype

# --- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["renoise", "adams_bashforth"])
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
    schedule = tensors(engine._stages._schedule)  # written once, when the stages are made
    with torch.inference_mode():
        written = [tensor.clone() for tensor in schedule]
        engine._stages.buffers.poison()
        copy_tree(schedule, written)
    again = dataclasses.replace(inputs.constants)  # equal values, but not the active session's
    inputs.constants = again
    poisoned = run_chunk(engine, inputs, motion, windows, 0)
    assert torch.equal(poisoned.latent, clean.latent) and torch.equal(poisoned.frames, frames)
    assert torch.equal(poisoned.motion, clean.motion) and torch.equal(poisoned.pixels, clean.pixels)


def test_what_is_decoded_is_remembered_in_the_rooms_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache beside them is 6 GB at 768 x 448; only to find the rooms' shapes one is made, before there are
    rooms."""
    in_rooms = []
    decode_step = VAE.decode_step

    def noting(vae: VAE, *arguments: Any, rooms: list[Tensor] | None = None, **named: Any) -> Any:
        in_rooms.append(rooms is not None)
        return decode_step(vae, *arguments, rooms=rooms, **named)

    monkeypatch.setattr(VAE, "decode_step", noting)
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    inputs = Inputs(engine)
    run_chunk(engine, inputs, inputs.constants.first_motion.float(), inputs.windows(), 0)
    assert in_rooms[0] is False and len(in_rooms) > 3 and all(in_rooms[1:])
    assert engine._stages is not None and not engine._stages._rooms, "let go of when a chunk is decoded"


def test_what_compiling_ahead_runs_leaves_nothing_behind() -> None:
    """On a GPU it runs before the first chunk, on what is not computed."""
    results = []
    for disturbed in (False, True):
        engine = small_engine(steps=2)
        session = engine.session(portrait(), seed=1)
        chunks = push(session, speech(CHUNK))
        if disturbed:
            assert engine._stages is not None
            with torch.inference_mode():
                engine._stages._launch_all(engine.times)
        results.append(frames_of([*chunks, *push(session, speech(CHUNK, seed=2))]))
    assert torch.equal(*results)


def test_pixels_and_latents_outlive_the_next_chunk() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    inputs = Inputs(engine)
    made = run_chunk(engine, inputs, inputs.constants.first_motion.float(), inputs.windows(), 0)
    kept = [made.latent.clone(), made.motion.clone(), made.pixels.clone()]
    run_chunk(engine, inputs, made.motion, inputs.windows(), 1)
    assert all(torch.equal(*both) for both in zip(kept, (made.latent, made.motion, made.pixels), strict=True))


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


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("fp32", "cuda", torch.float32),
        ("bf16", "cuda", torch.float16),
        ("fp8", "cuda", torch.float16),
        ("bf16", "cpu", torch.float32),
        ("fp8", "cpu", torch.float32),
    ],
)
def test_what_the_vae_computes_in(precision: Precision, device: str, dtype: torch.dtype) -> None:
    assert vae_dtype(precision, torch.device(device)) == dtype


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_the_default_where_the_machine_computes_it(
    native: bool, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    engine = Engine(tiny.model(), height=16, width=16)
    assert engine.precision == precision and engine.model.dit.dtype == DTYPES[precision]


# --- prepared once ---------------------------------------------------------------------------------


def test_another_session_uses_the_same_stages_and_buffers() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    push(engine.session(portrait(0), prompt="a", seed=0), speech(CHUNK))
    stages = engine._stages
    assert stages is not None
    before = {i: t.data_ptr() for i, t in enumerate(tensors(list(stages.buffers._buffers.values())))}
    push(engine.session(portrait(1), prompt="another one", seed=7), speech(CHUNK, seed=1))
    assert engine._stages is stages
    assert before == {i: t.data_ptr() for i, t in enumerate(tensors(list(stages.buffers._buffers.values())))}


def test_what_depends_on_the_noise_level_and_size_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running stream embeds no noise level and makes no rotary table; its chunks stay the plain loop's."""
    engine = Engine(tiny.model(), steps=3, precision="bf16", height=16, width=32)
    inputs = Inputs(engine)
    motion, windows = inputs.constants.first_motion.float(), [inputs.windows() for _ in range(2)]
    expected = [plain_chunk(engine, inputs.constants, motion, windows[i], inputs.noise(i)) for i in range(2)]
    first = run_chunk(engine, inputs, motion, windows[0], 0)
    assert torch.equal(first.latent, expected[0][0])

    def again(*_: object) -> None:
        raise AssertionError("computed again")

    dit = engine.model.dit
    for name in ("time_embedding", "time_projection"):
        monkeypatch.setattr(getattr(dit, name), "forward", again)
    for name in ("positions", "modulations"):
        monkeypatch.setattr(dit, name, again)
    monkeypatch.setattr(ops, "rope_table", again)
    second = run_chunk(engine, inputs, motion, windows[1], 1)
    assert torch.equal(second.latent, expected[1][0]) and torch.equal(second.pixels, expected[1][3])
    with pytest.raises(AssertionError, match="computed again"):
        plain_chunk(engine, inputs.constants, motion, windows[1], inputs.noise(1))


def test_a_session_reads_its_picture_and_prompt_once_and_each_chunk_its_sound_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(tiny.model(), steps=3, precision="fp32", height=16, width=16)
    session = engine.session(portrait())
    push(session, speech(CHUNK))

    def again(*_: object) -> None:
        raise AssertionError("computed again")

    model = engine.model
    for owner, name in ((model.dit, "context"), (model, "text_encoder"), (model, "image_encoder")):
        monkeypatch.setattr(owner, name, again)
    heard = []
    audio_context = model.dit.audio_context
    monkeypatch.setattr(
        model.dit, "audio_context", lambda audio: (heard.append(audio.shape), audio_context(audio))[1]
    )
    assert len(push(session, speech(CHUNK), speech(CHUNK))) == 2
    assert len(heard) == 2, "one chunk's audio keys and values serve its three steps"
    with pytest.raises(AssertionError, match="computed again"):
        engine.session(portrait())


def test_the_steps_share_one_rotary_table() -> None:
    engine = Engine(tiny.model(), steps=3, precision="fp32", height=16, width=16)
    push(engine.session(portrait()), speech(CHUNK))
    stages = engine._stages
    assert stages is not None and len(stages._schedule) == 3
    table = stages.buffers["positions"]
    assert all(step.table is table for step in stages._schedule)
    layers, dim = engine.model.dit.config.num_layers, engine.model.dit.config.dim
    for step in stages._schedule:
        assert sum(t.nbytes for t in tensors(step.modulations)) == (6 * layers + 2) * dim * 4


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
    push(session, speech(CHUNK))
    stages = engine._stages
    assert stages is not None and stages._active() is not None
    session.close()
    gc.collect()
    assert stages._active() is None


def test_close_releases_and_refuses() -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    session = engine.session(portrait())
    push(session, speech(CHUNK))
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
    push(engine.session(portrait()), speech(CHUNK))
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
    alone = [frames_of(push(engine.session(portrait(i), seed=i), audio[i])) for i in range(2)]
    together: dict[int, Tensor] = {}
    sessions = [engine.session(portrait(i), seed=i) for i in range(2)]

    def work(i: int) -> None:
        together[i] = frames_of(push(sessions[i], audio[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[i], alone[i]) for i in range(2))

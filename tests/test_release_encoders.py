"""The text and image encoders can be released once the sessions have started; nothing keeps them alive."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import tiny
import tiny_published
import torch
from streams import CHUNK, frames_of, portrait, push, speech
from torch import nn

from flashtalk_rt import bench, cli
from flashtalk_rt.bench import suite
from flashtalk_rt.errors import InputError
from flashtalk_rt.modules.model import Model
from flashtalk_rt.modules.weights import load
from flashtalk_rt.runtime import Engine, Session


def test_released_encoders_are_gone_and_the_sessions_go_on(tmp_path: Path) -> None:
    """With CLIP and umT5 from a published folder, before and after the stages are made."""
    model = load(tiny_published.write_published(tmp_path / "model"), "cpu", torch.float32)
    engine = Engine(model, steps=1, precision="fp32", height=16, width=16)
    sessions = [engine.session(portrait(), "a person", seed=seed) for seed in (0, 0)]
    audio = [speech(CHUNK, seed=i) for i in range(2)]
    kept = frames_of(push(sessions[0], *audio))
    text, image = model.text_encoder, model.image_encoder
    assert isinstance(text, nn.Module) and isinstance(image, nn.Module)
    held = [weakref.ref(x) for x in (text, image, *text.parameters(), *image.parameters())]
    audio_encoder = model.audio_encoder
    del text, image

    model.release_encoders()
    assert len(held) > 20 and not any(ref() for ref in held)
    assert model.audio_encoder is audio_encoder and model.networks() == [model.dit, model.vae, audio_encoder]
    assert torch.equal(frames_of(push(sessions[1], *audio)), kept)
    push(sessions[0], speech(CHUNK, seed=2))
    for other in (engine, Engine(model, steps=2, precision="fp32", height=16, width=32)):
        with pytest.raises(InputError, match=r"encoders were released.*load the model again"):
            other.session(portrait())
    model.release_encoders()  # a second time changes nothing


def refuses_sessions(model: Model) -> bool:
    try:
        model.text_encoder("a")
    except InputError:
        return True
    return False


class Enough(Exception):
    """What there is to see was seen."""


def test_the_bench_measures_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()

    def next_chunk(stream: suite.Stream) -> None:
        assert refuses_sessions(model)
        raise Enough

    monkeypatch.setattr(suite.Stream, "next_chunk", next_chunk)
    with pytest.raises(Enough):
        bench.measure(model, 1, "fp32", 16, 16)


def test_generate_makes_its_video_without_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stream_through(reader: object, session: Session, *_: object) -> None:
        assert refuses_sessions(session._engine.model)
        raise Enough

    monkeypatch.setattr(cli, "stream_through", stream_through)
    assets = Path(cli.__file__).parent / "assets"
    given = ["--image", str(assets / "portrait.png"), "--audio", str(assets / "speech.flac")]
    with pytest.raises(Enough):
        cli.main(["generate", *given, "--out", str(tmp_path / "a.mp4"), "--device", "cpu"])

"""The embedded model: what it refuses, what it says of itself, and that its mouth follows speech."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

import flashtalk_rt as ft
from flashtalk_rt.media import AudioReader
from flashtalk_rt.training.world.face import cavity_height
from flashtalk_rt.training.world.metrics import pearson
from flashtalk_rt.training.world.speech import mouth_truth

ASSETS = Path(__file__).parents[1] / "flashtalk_rt" / "assets"


@pytest.fixture(scope="module")
def model() -> ft.Model:
    return ft.load("embedded", device="cpu")


@pytest.mark.parametrize("crop", [(slice(0, 512), slice(0, 512)), (slice(0, 220), slice(130, 330))])
def test_a_real_photograph_is_refused(model: ft.Model, crop: tuple[slice, slice]) -> None:
    photograph = np.ascontiguousarray(skimage.data.astronaut()[crop])
    with pytest.raises(ft.InputError, match="--checkpoint"):
        ft.Engine(model).session(image=photograph)


def test_the_bundled_portrait_is_accepted_at_other_sizes_too(model: ft.Model) -> None:
    ft.Engine(model, steps=1, height=112, width=80).session(image=ASSETS / "portrait.png")


def test_it_calls_itself_a_toy(model: ft.Model) -> None:
    assert model.label == "toy model"


def test_its_mouth_follows_speech_and_no_other(model: ft.Model) -> None:
    """Over three chunks of the bundled recording, with the colour-based measure, no network."""
    samples = torch.from_numpy(np.concatenate(list(AudioReader(ASSETS / "speech.flac"))))
    samples = samples[: 3 * model.stream.chunk_samples]
    model.label = ""  # the drawn text is no part of the face
    session = ft.Engine(model, steps=8).session(image=ASSETS / "portrait.png", seed=1)
    session.push_audio(samples)
    frames = torch.cat([chunk.frames for chunk in session]).permute(0, 3, 1, 2) / 127.5 - 1
    model.label = "toy model"
    cavity = cavity_height(frames)
    truth = mouth_truth(samples, 16_000, 25)[:, 0]
    r = pearson(cavity, truth).item()
    backwards = pearson(cavity, truth.flip(0)).item()
    print(f"r {r:.3f}, to the speech backwards {backwards:.3f}")
    assert r > 0.8 and backwards < 0.5

"""The table that measures the toy, on an untrained one: what its rows must say whatever the networks are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flashtalk_rt.errors import InputError
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.vae import VAE
from flashtalk_rt.training.world import evaluate, export, nets
from flashtalk_rt.training.world.evaluate import Row, TestSet
from flashtalk_rt.training.world.face import IDENTITY_NAMES, MOTION_NAMES
from flashtalk_rt.training.world.probe import Reading
from flashtalk_rt.training.world.speech import sample_speech

CHUNKS = 13  # the fewest that drift is measured over


@pytest.fixture(scope="module")
def held_out() -> TestSet:
    """Two held-out faces of 64 x 64 pixels, each with a voice."""
    stream = dataclasses.replace(nets.TOY_STREAM, height=64, width=64)
    generator = torch.Generator().manual_seed(0)
    seconds = CHUNKS * stream.chunk_samples / stream.sample_rate_hz
    voices = sample_speech(2, seconds + 1, generator, "cpu")
    return evaluate.make_test_set(voices, 2, CHUNKS, stream, generator)


@pytest.fixture(scope="module")
def networks() -> tuple[DiT, VAE]:
    torch.manual_seed(0)
    replace = dataclasses.replace
    dit = DiT(replace(nets.TOY_DIT, dim=24, num_heads=2, num_layers=1, ffn_dim=16))
    return dit.eval(), VAE(replace(nets.TOY_VAE, dim=2)).eval()


@pytest.fixture(scope="module")
def rows(held_out: TestSet, networks: tuple[DiT, VAE]) -> dict[str, Row]:
    def brightness(frames: Tensor) -> Reading:
        """In the place of the probe, which takes 6 ms a frame."""
        value = frames.mean((1, 2, 3))[:, None]
        return Reading(value.expand(-1, len(MOTION_NAMES)), value.expand(-1, len(IDENTITY_NAMES)))

    lines: list[str] = []
    generator = torch.Generator().manual_seed(1)
    rows = evaluate.evaluate(*networks, brightness, held_out, (1,), generator, lines.append)
    assert len(lines) == 1
    return rows


def test_every_row_is_there_with_every_metric(rows: dict[str, Row]) -> None:
    model = ["model, 1 steps", "model, 1 steps, swapped audio"]
    controls = ["ground truth", "VAE reconstruction", "static reference", "last frame repeated"]
    assert list(rows) == controls + model
    assert all(row.keys() == rows["ground truth"].keys() >= export.COLUMNS.keys() for row in rows.values())


def test_the_truth_is_right_by_every_measure_that_needs_no_network(rows: dict[str, Row]) -> None:
    truth = rows["ground truth"]
    assert truth["cavity_r"] > 0.9, "the mouth of the renderer follows the speech"
    assert truth["pose_variance_ratio"] == pytest.approx(1) and truth["frechet"] == pytest.approx(0, abs=1e-6)
    assert truth["boundary_ratio"] == pytest.approx(1, abs=0.3)


def test_a_still_picture_is_found_out(rows: dict[str, Row]) -> None:
    still = rows["static reference"]
    assert still["lip_sync_r"] == 0 and still["cavity_r"] == 0
    assert still["pose_variance_ratio"] == 0 and still["collapsed"] == 1
    assert rows["last frame repeated"]["boundary_ratio"] == float("inf"), "it moves at the joins alone"


def test_more_chunks_than_the_voices_last_are_refused() -> None:
    voices = torch.zeros(2, 3 * nets.TOY_STREAM.chunk_samples + 5)
    with pytest.raises(InputError, match="chunks is 4, but the voices last 3"):
        evaluate.make_test_set(voices, 2, 4, nets.TOY_STREAM, torch.Generator())


def test_swapped_audio_alone_changes_the_frames(held_out: TestSet, networks: tuple[DiT, VAE]) -> None:
    def first_chunk(samples: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return next(evaluate.generated_frames(held_out, *networks, 1, generator, samples))

    assert torch.equal(first_chunk(None), first_chunk(held_out.samples))
    assert not torch.equal(first_chunk(None), first_chunk(held_out.samples.roll(1, 0)))

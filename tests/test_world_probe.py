"""The probe: shapes, scores against known answers, and a training loop that learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashtalk_rt.errors import CheckpointError
from flashtalk_rt.training.world.face import IDENTITY_NAMES, MOTION_NAMES, is_held_out, render
from flashtalk_rt.training.world.probe import (
    Probe,
    Reading,
    Sample,
    load_probe,
    probe_scores,
    random_sample,
    read_frames,
    save_probe,
    train_probe,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_reads_any_size_and_stays_small() -> None:
    probe = Probe().eval()
    assert sum(p.numel() for p in probe.parameters()) <= 1_500_000
    for size in ((96, 96), (64, 64), (128, 160)):
        reading = probe(torch.zeros(2, 3, *size))
        assert reading.motion.shape == (2, len(MOTION_NAMES))
        assert reading.identity.shape == (2, len(IDENTITY_NAMES))
    clips = read_frames(probe, torch.zeros(2, 3, 3, 96, 96))
    assert clips.motion.shape == (2, 3, 10)
    assert clips.identity.shape == (2, 3, 12)


def test_random_samples_cover_every_parameter_and_keep_the_split() -> None:
    sample = random_sample(300, 16, seeded())
    assert sample.frames.shape == (300, 3, 16, 16)
    assert not bool(is_held_out(sample.identity).any())
    assert bool(is_held_out(random_sample(50, 16, seeded(), held_out=True).identity).all())
    assert bool((sample.motion.std(0) > 0.25).all())
    torch.testing.assert_close(
        render(sample.identity, sample.motion[:, None], 16, 16)[:, 0], sample.frames, rtol=0, atol=1e-5
    )


def test_gradients_reach_every_weight() -> None:
    probe = Probe()
    sample = random_sample(4, 96, seeded())
    reading = probe(sample.frames)
    (reading.motion.square().mean() + reading.identity.square().mean()).backward()
    for name, parameter in probe.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_training_learns_and_goes_through_augment() -> None:
    probe = Probe()
    generator = seeded()
    batches = [random_sample(8, 96, generator) for _ in range(4)]
    seen: list[int] = []
    reports: list[int] = []

    def augment(frames: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return frames + 0.01 * torch.randn(frames.shape)

    def source() -> Sample:
        seen.append(1)
        return batches[len(seen) % 4]

    losses = train_probe(probe, source, 30, augment=augment, on_step=lambda step, _loss: reports.append(step))
    assert len(losses) == len(seen) == 30
    assert reports == [0]
    assert losses[0] == pytest.approx(1, abs=0.25)  # chance, in units of a uniform's variance
    assert sum(losses[-5:]) / 5 < 0.7 * sum(losses[:5]) / 5
    assert not probe.training


class Oracle(Probe):
    """Answers with what it was told, plus an error of known size."""

    def __init__(self, motion: Tensor, identity: Tensor, error: float) -> None:
        super().__init__()
        self.answers = Reading(motion + error, identity + error)

    def forward(self, frames: Tensor) -> Reading:
        return self.answers


def test_scores_match_their_definition() -> None:
    sample = random_sample(64, 96, seeded(2))
    frames, motion = sample.frames[:, None], sample.motion[:, None]
    exact = probe_scores(Oracle(sample.motion, sample.identity, 0.0), sample.identity, motion, frames)
    assert set(exact) == {
        *MOTION_NAMES,
        *IDENTITY_NAMES,
        "motion_mean",
        "identity_mean",
        "mouth_open_cavity_r",
    }
    assert exact["identity_mean"] == exact["motion_mean"] == exact["skin"] == 1
    assert exact["mouth_open_cavity_r"] > 0.95
    off = probe_scores(Oracle(sample.motion, sample.identity, 0.1), sample.identity, motion, frames)
    for name, truth in zip(IDENTITY_NAMES, sample.identity.T, strict=True):
        assert off[name] == pytest.approx(1 - 0.01 / float(truth.var(correction=0)), abs=1e-4)
    still = motion.clone()
    still[..., 0] = 0.5
    scores = probe_scores(Oracle(sample.motion, sample.identity, 0.0), sample.identity, still, frames)
    assert scores["yaw"] != scores["yaw"]  # NaN: a constant has no variance to explain
    assert scores["motion_mean"] == 1


def test_weights_survive_a_file_and_a_wrong_file_is_named(tmp_path: Path) -> None:
    probe = Probe().eval()
    path = tmp_path / "probe.safetensors"
    save_probe(probe, path)
    frames = torch.randn(2, 3, 96, 96)
    for mine, loaded in zip(probe(frames), load_probe(path)(frames), strict=True):
        torch.testing.assert_close(loaded, mine)
    with pytest.raises(CheckpointError, match="no probe"):
        load_probe(tmp_path / "absent.safetensors")
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(CheckpointError, match="not a probe"):
        load_probe(path)

"""Stage 1: the flow-matching loss, what it draws, and the rollout that is a session."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from flashtalk_rt.config import StreamConfig
from flashtalk_rt.modules.audio import audio_windows
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.image import load_image
from flashtalk_rt.runtime import Engine
from flashtalk_rt.training.rollout import rollout
from flashtalk_rt.training.stage1 import (
    FlowBatch,
    batch_windows,
    drop_condition,
    flow_matching_loss,
    sample_times,
)


def flow_batch(kept: int) -> FlowBatch:
    """Three random clips of three latent frames, the first `kept` of which are motion."""
    count, frames = 3, 3
    g = torch.Generator().manual_seed(0)
    config = tiny.DIT

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=g)

    return FlowBatch(
        target=normal(16, frames, 4, 2),
        noise=normal(16, frames, 4, 2),
        t=torch.rand(count, generator=g),
        motion=normal(16, kept, 4, 2),
        y=normal(20, frames, 4, 2),
        text=normal(2, config.text_dim),
        image=normal(5, config.image_dim),
        audio=normal(4 * frames - 3, config.audio_window, config.audio_blocks, config.audio_dim),
        weight=torch.rand(1, 1, 1, 4, 2, generator=g),
    )


class Stub:
    """A DiT that predicts the velocity it was told to and keeps what it was given."""

    def __init__(self, velocity: Tensor) -> None:
        self.velocity = velocity

    def context(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return text, image

    def audio_context(self, audio: Tensor) -> Tensor:
        return audio

    def __call__(self, latent: Tensor, t: Tensor, y: Tensor, context: Any, audio: Tensor) -> Tensor:
        self.latent, self.t, self.y, self.seen, self.audio = latent, t, y, context, audio
        return self.velocity


@pytest.mark.parametrize("kept", [1, 2])
def test_the_loss_wants_noise_minus_target_on_the_new_frames(kept: int) -> None:
    batch = flow_batch(kept=kept)
    stub = Stub(batch.noise - batch.target)
    assert flow_matching_loss(stub, batch).item() == 0  # type: ignore[arg-type]
    for i, t in enumerate(batch.t.tolist()):
        noisy = (1 - t) * batch.target[i] + t * batch.noise[i]
        torch.testing.assert_close(stub.latent[i, :, kept:], noisy[:, kept:])
    assert torch.equal(stub.latent[:, :, :kept], batch.motion)
    assert torch.equal(stub.t, batch.t * 1000) and torch.equal(stub.y, batch.y)
    assert stub.seen[0] is batch.text and stub.seen[1] is batch.image and stub.audio is batch.audio
    stub.velocity = stub.velocity + 2
    loss = flow_matching_loss(stub, batch).item()  # type: ignore[arg-type]
    assert loss == pytest.approx(4 * batch.weight.mean().item()), "each place by its weight"


@pytest.mark.parametrize("kept", [1, 2])
def test_motion_frames_leave_the_loss(kept: int) -> None:
    torch.manual_seed(0)
    dit, batch = DiT(tiny.DIT).eval(), flow_batch(kept=kept)
    loss = flow_matching_loss(dit, batch)
    loss.backward()
    assert loss.item() > 0
    assert all(p.grad is not None for p in dit.parameters())
    for name in ("target", "noise"):
        other = getattr(batch, name).clone()
        other[:, :, :kept] += 100
        assert torch.equal(flow_matching_loss(dit, batch._replace(**{name: other})), loss)
        other[:, :, kept] += 1
        assert not torch.equal(flow_matching_loss(dit, batch._replace(**{name: other})), loss)
    assert not torch.equal(flow_matching_loss(dit, batch._replace(motion=batch.motion + 1)), loss)


def test_noise_levels_are_shifted_uniforms() -> None:
    times = sample_times(20_000, 5.0, torch.Generator().manual_seed(0))
    assert times.min() > 0 and times.max() < 1
    for quantile in (0.1, 0.5, 0.9):
        expected = 5 * quantile / (1 + 4 * quantile)
        assert times.quantile(quantile).item() == pytest.approx(expected, abs=0.02)


def test_conditions_drop_whole_and_as_often_as_asked() -> None:
    x = torch.ones(20_000, 2, 3)
    out = drop_condition(x, 0.05, torch.Generator().manual_seed(0))
    kept = out.flatten(1).amin(1)
    assert torch.equal(kept, out.flatten(1).amax(1)) and set(kept.tolist()) == {0.0, 1.0}
    # Five standard deviations.
    assert (1 - kept.mean()).item() == pytest.approx(0.05, abs=5 * math.sqrt(0.05 * 0.95 / 20_000))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(drop_condition(x, 0.0, generator), x)
    assert not drop_condition(x, 1.0, generator).any()


@pytest.mark.parametrize(("frames", "window"), [(33, 5), (20, 3), (40, 1)])
def test_batch_windows_are_audio_windows(frames: int, window: int) -> None:
    features = torch.randn(3, 40, 2, 6, generator=torch.Generator().manual_seed(0))
    out = batch_windows(features, frames, window)
    assert out.shape == (3, frames, window, 2, 6)
    for i in range(3):
        assert torch.equal(out[i : i + 1], audio_windows(features[i], frames, window))


def test_a_rollout_is_a_session() -> None:
    """Training and runtime share no loop; the same seed and sound must give the same frames."""
    stream = StreamConfig(height=32, width=32, steps=2, sampler="renoise")
    model = tiny.model(height=32, width=32)
    engine = Engine(model, steps=2, precision="fp32")
    portrait = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    session = engine.session(portrait, seed=5)
    samples = 0.1 * torch.randn(3 * stream.chunk_samples, generator=torch.Generator().manual_seed(1))
    session.push_audio(samples)
    pixels = load_image(portrait, 32, 32)
    made = rollout(
        model.dit,
        model.vae,
        pixels,
        model.image_encoder(pixels),
        samples[None],
        stream,
        2,
        torch.Generator().manual_seed(5),
    )
    for chunk, frames in zip(session, made, strict=True):
        expected = ((frames[0] + 1) * 127.5).permute(1, 2, 3, 0)
        assert (chunk.frames.float() - expected).abs().max() < 1

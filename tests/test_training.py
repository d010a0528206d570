"""The training loop, the flow-matching loss and the commands, at the smallest scale."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from flashtalk_rt.config import StreamConfig
from flashtalk_rt.errors import CheckpointError, InputError
from flashtalk_rt.modules.audio import audio_windows
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.image import load_image
from flashtalk_rt.runtime import Engine
from flashtalk_rt.training.loop import FitConfig, fit
from flashtalk_rt.training.rollout import rollout
from flashtalk_rt.training.stage1 import (
    FlowBatch,
    batch_windows,
    drop_condition,
    flow_matching_loss,
    sample_times,
)
from flashtalk_rt.training.world import commands, fit_dit, fit_vae, nets
from flashtalk_rt.training.world.data import SpeechBank
from flashtalk_rt.training.world.face import cavity_height

# --- the loop --------------------------------------------------------------------------------------

CONFIG = FitConfig(steps=6, peak_lr=1e-2, warmup=3, ema=0.7, save_every_s=0.0, log_every=3)


def small_net(seed: int = 0, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))


def data(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=g)
    return x, 30 * x[:, :2].flip(1)  # far away, so that the gradient is clipped


def train(
    net: nn.Module,
    checkpoint: Path,
    config: FitConfig = CONFIG,
    inputs_of: Callable[[int], tuple[Tensor, ...]] = data,
) -> list[dict[str, float]]:
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = (net(x) - y).square().mean()
        return loss

    return fit(net, inputs_of, loss_of, config, checkpoint, torch.Generator(), lambda line: None)


def test_resuming_gives_the_same_bits_as_going_straight(tmp_path: Path) -> None:
    straight = small_net()
    history = train(straight, tmp_path / "straight.ckpt")

    def stopped(step: int) -> tuple[Tensor, Tensor]:
        if step == 4:
            raise KeyboardInterrupt
        return data(step)

    with pytest.raises(KeyboardInterrupt):
        train(small_net(), tmp_path / "parts.ckpt", inputs_of=stopped)
    resumed, steps = small_net(seed=9), []

    def counted(step: int) -> tuple[Tensor, Tensor]:
        steps.append(step)
        return data(step)

    resumed_history = train(resumed, tmp_path / "parts.ckpt", inputs_of=counted)
    assert steps == [3, 4, 5], "it goes on from the last save"
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [row["step"] for row in resumed_history] == [3, 6]
    for a, b in zip(history, resumed_history, strict=True):
        assert a["loss"] == b["loss"] and a["lr"] == b["lr"]
    assert resumed_history[1]["seconds"] > resumed_history[0]["seconds"] > 0

    # A finished run is not trained again, and gives the same average.
    steps.clear()
    again = small_net(seed=9)
    assert len(train(again, tmp_path / "parts.ckpt", inputs_of=counted)) == 2 and not steps
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), resumed.parameters(), strict=True))
    assert not list(tmp_path.glob("*.partial"))


def test_a_resumed_run_draws_new_data(tmp_path: Path) -> None:
    """One generator draws all of a run's data; its state is part of the checkpoint."""

    def run(checkpoint: Path, stop_at: int | None) -> list[float]:
        generator, drawn = torch.Generator().manual_seed(7), []

        def inputs_of(step: int) -> tuple[Tensor, ...]:
            if step == stop_at:
                raise KeyboardInterrupt
            drawn.append(torch.rand((), generator=generator).item())
            return data(step)

        net = small_net()

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = (net(x) - y).square().mean()
            return loss

        with contextlib.suppress(KeyboardInterrupt):
            fit(net, inputs_of, loss_of, CONFIG, checkpoint, generator, lambda line: None)
        return drawn

    straight = run(tmp_path / "straight.ckpt", None)
    assert run(tmp_path / "parts.ckpt", 3) + run(tmp_path / "parts.ckpt", None) == straight
    assert len(set(straight)) == CONFIG.steps


def other_network(path: Path) -> None:
    train(small_net(width=6), path)


BAD_CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "another network": other_network,
    "garbage": lambda path: path.write_bytes(b"not a checkpoint at all" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: (other_network(path), path.write_bytes(path.read_bytes()[:500])),
    "another file of torch": lambda path: torch.save([1, 2, 3], path),
    "a dictionary of other things": lambda path: torch.save({"weights": torch.ones(3)}, path),
    "not plain weights": lambda path: torch.save({"step": Path("x"), "net": print}, path),
}


@pytest.mark.parametrize("bad", BAD_CHECKPOINTS)
def test_a_wrong_checkpoint_is_named(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    BAD_CHECKPOINTS[bad](path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"run\.ckpt is not a checkpoint of this training"):
        train(small_net(), path)
    assert path.read_bytes() == before


def test_learning_rate() -> None:
    config = FitConfig(steps=1000, peak_lr=2e-3, warmup=100)
    assert config.lr(0) == pytest.approx(2e-5, rel=1e-3), "one hundredth of the way up"
    assert config.lr(49) == pytest.approx(1e-3, rel=0.01)
    half = 2e-3 * (0.01 + 0.99 * 0.5)
    assert config.lr(500) == pytest.approx(half)
    assert config.lr(1000) == pytest.approx(2e-5) == config.lr(5000)
    for step in (100, 300, 700):
        cosine = 0.5 * (1 + math.cos(math.pi * step / 1000))
        assert config.lr(step) == pytest.approx(2e-3 * (0.01 + 0.99 * cosine))


def test_the_loop_is_adamw_with_clipping_and_an_average(tmp_path: Path) -> None:
    net = small_net()
    history = train(net, tmp_path / "run.ckpt")

    expected = small_net()
    parameters = list(expected.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    average = [p.detach().clone() for p in parameters]
    losses = []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = CONFIG.lr(step)
        x, y = data(step)
        loss = (expected(x) - y).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 1, "the clipping is tested"
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / norm
        optimizer.step()
        decay = min(0.7, (step + 1) / (step + 10))
        with torch.no_grad():
            average = [decay * a + (1 - decay) * p for a, p in zip(average, parameters, strict=True)]
        losses.append(loss.item())
    for ours, wanted, last in zip(net.parameters(), average, parameters, strict=True):
        torch.testing.assert_close(ours.detach(), wanted, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(ours, last, rtol=1e-4)
    assert [row["step"] for row in history] == [3, 6]
    assert [row["loss"] for row in history] == pytest.approx(
        [np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-5
    )
    assert [row["lr"] for row in history] == [CONFIG.lr(2), CONFIG.lr(5)]
    assert not net.training


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="loss is nan at step 3"):
        train(
            small_net(),
            tmp_path / "run.ckpt",
            inputs_of=lambda step: (data(step)[0], torch.full((8, 2), math.nan)),
        )
    assert not (tmp_path / "run.ckpt").exists()


# --- flow matching ---------------------------------------------------------------------------------


def flow_batch(count: int = 3, frames: int = 3, kept: int = 1) -> FlowBatch:
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


# --- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and pictures of the smallest size."""
    replace = dataclasses.replace
    monkeypatch.setattr(nets, "TOY_STREAM", replace(nets.TOY_STREAM, height=16, width=16))
    monkeypatch.setattr(nets, "TOY_VAE", replace(nets.TOY_VAE, dim=2))
    monkeypatch.setattr(nets, "TOY_DIT", replace(nets.TOY_DIT, dim=24, num_heads=2, num_layers=1, ffn_dim=16))
    first = fit_dit.ClipKind("first", outside=False, reencoded=False, height=16, width=16)
    later = fit_dit.ClipKind("later", outside=True, reencoded=False, height=16, width=16)
    streamed = fit_dit.ClipKind("later", outside=True, reencoded=True, height=32, width=16)
    monkeypatch.setattr(fit_dit, "BASE_KINDS", ((first, 0.5), (later, 0.5)))
    monkeypatch.setattr(fit_dit, "STAGE1_KINDS", ((first, 0.5), (streamed, 0.5)))
    monkeypatch.setattr(fit_dit.ClipPool, "PARTS", 1)
    for module in (fit_dit, fit_vae):
        monkeypatch.setattr(
            module, "SpeechBank", lambda speakers, _, generator: SpeechBank(1, 10.0, generator)
        )
    measure = fit_vae.latent_statistics
    monkeypatch.setattr(fit_vae, "latent_statistics", lambda *args: measure(*args, clips=16))


# On a GPU a step is compiled and captured: it may copy nothing from the host.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_commands_train_resume_and_record(small_world: None, tmp_path: Path, device: str) -> None:
    run = tmp_path / "run"
    cpu = torch.device("cpu")
    commands.world_vae(run, steps=2, batch=1, device=device, seed=0)
    vae = nets.load_vae(run / "vae.safetensors", cpu)
    assert vae.config.latent_mean != nets.TOY_VAE.latent_mean, "measured"
    assert all(math.isfinite(s) and s > 0 for s in vae.config.latent_std)

    commands.world_base(run, steps=2, batch=2, clips=64, device=device, seed=0)
    first = nets.load_dit(run / "base.safetensors", cpu).state_dict()
    commands.world_base(run, steps=3, batch=2, clips=64, device=device, seed=0)
    more = nets.load_dit(run / "base.safetensors", cpu).state_dict()
    assert any(not torch.equal(first[name], more[name]) for name in first), "it went on"
    log = json.loads((run / "log-base.json").read_text())
    assert log["command"] == "world-base" and log["steps"] == 3
    assert [row["step"] for row in log["history"]] == [2, 3]

    commands.world_stage1(run, steps=3, batch=2, clips=64, device=device, seed=0)
    adapted = nets.load_dit(run / "stage1.safetensors", cpu).state_dict()
    assert all(bool(value.isfinite().all()) for value in adapted.values())
    assert json.loads((run / "log-stage1.json").read_text())["source"].endswith("base.safetensors")


def test_a_command_names_what_must_run_before_it(small_world: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vae\.safetensors does not exist"):
        commands.world_base(tmp_path, steps=1, batch=1, device="cpu", seed=0)
    (tmp_path / "vae.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"vae\.safetensors was not written by this training"):
        commands.world_base(tmp_path, steps=1, batch=1, device="cpu", seed=0)


def test_without_cuda_the_device_is_named(
    small_world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"device is cuda.*--device cpu"):
        commands.world_vae(tmp_path, steps=1, batch=1, seed=0, device="cuda")


def test_the_impulse_response_tells_frames_apart() -> None:
    """A VAE that holds each group's last frame answers to that frame alone; a perfect one to all."""

    class Perfect:
        def encode(self, video: Tensor) -> Tensor:
            return video

        def decode(self, video: Tensor) -> Tensor:
            return video

    class Holding(Perfect):
        def decode(self, video: Tensor) -> Tensor:
            later = video[:, :, 1:].unflatten(2, (-1, 4))[:, :, :, -1:].expand(-1, -1, -1, 4, -1, -1)
            return torch.cat((video[:, :, :1], later.flatten(2, 3)), dim=2)

    responses = [
        fit_vae.impulse_response(vae, (32, 32), torch.Generator().manual_seed(0), faces=2)  # type: ignore[arg-type]
        for vae in (Perfect(), Holding())
    ]
    assert responses[0] == pytest.approx([1, 1, 1, 1])
    assert responses[1] == pytest.approx([0, 0, 0, 1], abs=1e-6)


def test_restless_clips_move_in_every_frame() -> None:
    bank = SpeechBank(2, 10.0, torch.Generator().manual_seed(0))

    def change(restless: float) -> float:
        generator = torch.Generator().manual_seed(1)
        video = fit_vae.sample_video(bank, 8, 9, (64, 64), generator, restless)
        return cavity_height(video.transpose(1, 2)).diff(dim=1).abs().mean().item()

    assert change(1.0) > 1.5 * change(0.0)
    with pytest.raises(InputError, match="--frames is 8"):
        commands.world_vae(Path("none"), frames=8, device="cpu")

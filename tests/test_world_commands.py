"""The training commands, at the smallest scale."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashtalk_rt.errors import CheckpointError, InputError
from flashtalk_rt.training.world import commands, fit_dit, fit_vae, nets
from flashtalk_rt.training.world.data import SpeechBank
from flashtalk_rt.training.world.face import cavity_height


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


@pytest.mark.parametrize("steps", ["", "4,", "0", "4;8", "four"])
def test_steps_that_are_no_numbers_are_named(steps: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--steps is '{steps}'"):
        commands.world_eval(tmp_path, tmp_path / "voices", steps=steps, device="cpu")


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

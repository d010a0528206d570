"""The training loop: resuming, its checkpoints, and the optimizer it is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flashtalk_rt.errors import CheckpointError
from flashtalk_rt.training.loop import FitConfig, fit

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
    inputs_of: Callable[[int], tuple[Tensor, ...]] = data,
) -> list[dict[str, float]]:
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = (net(x) - y).square().mean()
        return loss

    return fit(net, inputs_of, loss_of, CONFIG, checkpoint, torch.Generator(), lambda line: None)


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

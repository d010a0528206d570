"""`flashtalk bench` to its end, and what `pytest --benchmark` says where it cannot run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from command import ROOT
from test_bench import PLAN

from flashtalk_rt import ops
from flashtalk_rt.bench import command
from flashtalk_rt.cli import main
from flashtalk_rt.modules.model import Model
from flashtalk_rt.profiles import budgets, record

SIZES = ("768x448-4", "768x448-2", "768x448-1", "720x416-4")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command with a tiny model and little to measure. The model is the only thing that needs a GPU."""

    def model(device: str | None, height: int, width: int) -> Model:
        assert (device, height, width) == (None, 16, 32)
        return tiny.model()

    monkeypatch.setattr(command, "published_model", model)
    monkeypatch.setattr(command, "Plan", lambda chunks: dataclasses.replace(PLAN, chunks=chunks))
    monkeypatch.setattr(ops, "REGISTRY", [spec for spec in ops.REGISTRY if spec.name == "adaln"])
    monkeypatch.setattr(budgets, "FOLDER", tmp_path / "budgets")


def run_bench(out: Path, *more: str) -> int:
    options = ["--size", "16x32", "--steps", "1", "--precision", "fp32", "--chunks", "2"]
    return main(["bench", *options, "--out", str(out), *more])


def write_budget(target_ms: float) -> None:
    """For a step on this processor."""
    path = budgets.budget_file(record.environment(torch.device("cpu"))["device"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        'device = "this"\ngpus = 0\nheight = 16\nwidth = 32\n'
        f'[[budget]]\nfigure = "dit_step_ms"\ntarget = {target_ms}\n'
    )


@pytest.mark.usefixtures("small")
def test_bench_writes_its_result_its_table_and_its_plot_and_tells_a_breach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_budget(target_ms=54321)
    assert run_bench(tmp_path / "kept.json", "--plot", str(tmp_path / "plot.png")) == 0
    made = record.read_latency(tmp_path / "kept.json")
    assert (made["height"], made["width"], made["steps"], made["precision"]) == (16, 32, 1, "fp32")
    assert made["chunks"] == 2 and made["reference"]["dit_step_ms"] > 0 and set(made["ops"]) == {"adaln"}
    said = capsys.readouterr()
    assert said.err == ""
    assert all(text in said.out for text in ("making chunks", "dit step", "54,321", "Operators"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    # The same figures again: measuring them takes a while.
    monkeypatch.setattr(command, "measure", lambda *arguments, **more: made)
    write_budget(target_ms=1e-6)
    assert run_bench(tmp_path / "breached.json") == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: over budget on this: dit_step_ms is ") and "1e-06" in said.err
    assert "dit step" in said.out and "Operators" in said.out
    assert record.read_latency(tmp_path / "breached.json") == made, "it is kept all the same"


def test_the_latency_suite_without_a_gpu_says_what_it_skipped_and_why() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--benchmark", "-p", "no:cacheprovider", "tests/benchmarks"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    begin = f"latency suite not run: torch {torch.__version__} sees no CUDA device; skipped "
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(begin)]
    cases = {f"test_latency[{size}-{precision}]" for size in SIZES for precision in ("bf16", "fp8")}
    cases |= {"test_latency[768x448-4-8bit]", "test_fp8_quality_of_random_weights[fp8]"}
    assert cases <= set(line.removeprefix(begin).split(", "))


@pytest.mark.usefixtures("small")
def test_a_plot_that_cannot_be_drawn_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "published_model", lambda *_: pytest.fail("measured"))
    assert run_bench(tmp_path / "kept.json", "--plot", str(tmp_path / "plot.what")) == 2
    assert "plot.what must end in" in capsys.readouterr().err

"""The folder that ships: it loads as a model, and its card shows every row of the evaluation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtalk_rt.errors import CheckpointError
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.vae import VAE
from flashtalk_rt.modules.weights import load
from flashtalk_rt.training.world import export, nets


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of the smallest networks, its logs and evaluation made up."""
    torch.manual_seed(0)
    replace = dataclasses.replace
    nets.save_net(VAE(replace(nets.TOY_VAE, dim=2)), tmp_path / "vae.safetensors")
    dit = DiT(replace(nets.TOY_DIT, dim=24, num_heads=2, num_layers=1, ffn_dim=16))
    nets.save_net(dit, tmp_path / "stage1.safetensors")
    scores = {"mouth_open": 0.91, "identity_mean": 0.82, "mouth_open_cavity_r": 0.73}
    log = {"steps": 7, "batch": 2, "device": "a processor", "history": [{"loss": 0.25, "seconds": 3.0}]}
    evaluation = {
        "net": "stage1", "identities": 2, "chunks": 13, "vae_psnr_db": 31.4,
        "rows": {name: dict.fromkeys(export.COLUMNS, 0.125) for name in ("ground truth", "model, 8 steps")},
    }  # fmt: skip
    evaluation["rows"]["model, 8 steps"]["boundary_ratio"] = None  # infinite, which JSON has not
    files: dict[str, dict[str, Any]] = {
        "log-vae": log, "log-probe": {**log, "held_out_r2": scores}, "log-stage1": log,
        "eval-stage1": evaluation,
    }  # fmt: skip
    for name, record in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(export, "portrait_floor_db", lambda vae, generator: 12.5)
    return tmp_path


def test_what_is_exported_loads_and_is_a_toy(run: Path, tmp_path: Path) -> None:
    (run / "NOTES.md").write_text("It was trained by hand.\n")
    export.export_model(run, tmp_path / "out")
    model = load(tmp_path / "out", "cpu")
    assert (model.label, model.min_portrait_psnr_db, model.stream) == ("toy model", 12.5, nets.TOY_STREAM)
    stored = nets.load_dit(run / "stage1.safetensors", torch.device("cpu")).state_dict()
    for name, value in model.dit.state_dict().items():
        assert torch.equal(value, stored[name].bfloat16().float()), name
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    columns = len(export.COLUMNS)
    assert "| ground truth | " + " | ".join(["0.125"] * columns) + " |" in card
    assert card.count("| 0.125") == 2 * columns - 1 and "| model, 8 steps |" in card
    assert "| stage1 | 7 | 2 | - | a processor | 3 | 0.2500 | - |" in card
    for said in ("It was trained by hand.", "31.4 dB", "R2 0.910", "r = 0.730"):
        assert said in card


@pytest.mark.parametrize("name", ["log-probe.json", "eval-stage1.json"])
def test_a_run_that_is_not_finished_is_named(run: Path, tmp_path: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} does not exist; run the training command"):
        export.export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_floor_for_portraits_lies_below_the_worst_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dimming:
        """A VAE that takes a tenth of the light: 10 log10(4 / 0.01) dB where a picture is white or black."""

        def encode(self, video: torch.Tensor) -> torch.Tensor:
            return video

        def decode(self, video: torch.Tensor) -> torch.Tensor:
            return 0.9 * video

    floor_db = export.portrait_floor_db(Dimming(), torch.Generator().manual_seed(0), portraits=32)  # type: ignore[arg-type]
    assert 26 - export.PORTRAIT_MARGIN_DB < floor_db < 40 - export.PORTRAIT_MARGIN_DB

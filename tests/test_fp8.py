"""float8 weights: quantised once, stored, loaded, run, and how much they cost the tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import flashtalk_rt as ft
from flashtalk_rt import ops
from flashtalk_rt.bench import fp8_quality
from flashtalk_rt.bench.models import DiTInputs
from flashtalk_rt.config import FLOAT8, DiTConfig, Precision
from flashtalk_rt.errors import CheckpointError, InputError
from flashtalk_rt.media import AudioReader
from flashtalk_rt.modules.chunk import reference_latent
from flashtalk_rt.modules.convert import convert, save_converted
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.image import load_image
from flashtalk_rt.modules.linear import Linear
from flashtalk_rt.modules.model import Model
from flashtalk_rt.modules.weights import load
from flashtalk_rt.runtime import Chunk, Engine

PORTRAIT = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def first_frames(model: Model, precision: Precision | None = None) -> torch.Tensor:
    session = Engine(model, precision=precision).session(PORTRAIT, seed=3)
    noise = torch.randn(model.stream.chunk_samples, generator=torch.Generator().manual_seed(0))
    session.push_audio(0.1 * noise)
    return next(iter(session)).frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny/ in bfloat16 and fp8/ converted from it."""
    path = tmp_path_factory.mktemp("fp8")
    save_converted(tiny.model(), path / "tiny", torch.bfloat16)
    convert(path / "tiny", path / "fp8", fp8=True)
    return path


def test_the_large_projections_and_nothing_else_are_float8() -> None:
    dit = DiT(tiny.DIT)
    dit.prepare(torch.bfloat16, fp8=True)
    found = {name.split(".", 2)[2] for name, p in dit.named_parameters() if p.dtype == ops.FP8}
    assert found == {
        *(f"self_attn.{x}.weight" for x in "qkvo"),
        *(f"cross_attn.{x}.weight" for x in ("q", "k", "v", "o", "k_img", "v_img")),
        *(f"ffn.{x}.weight" for x in (0, 2)),
    }
    for name, p in dit.named_parameters():
        if p.dtype != ops.FP8:
            assert p.dtype == (torch.float32 if name.endswith("weight_scale") else torch.bfloat16), name
    with pytest.raises(ValueError, match="float8 goes with bfloat16"):
        DiT(tiny.DIT).prepare(torch.float32, fp8=True)


def test_memory_is_released_where_weights_were_replaced_and_only_there() -> None:
    dit, releases = DiT(tiny.DIT), []
    for wanted in (2 * tiny.DIT.num_layers, 0):  # quantised and joined; nothing to do
        releases.clear()
        dit.prepare(torch.bfloat16, fp8=True, release=lambda: releases.append(1))
        assert len(releases) == wanted


def test_a_converted_folder_gives_what_quantising_at_load_gives(folder: Path) -> None:
    stored, quantised = load(folder / "fp8", "cpu"), load(folder / "tiny", "cpu")
    assert json.loads((folder / "fp8" / "flashtalk.json").read_text())["fp8"] is True
    assert torch.equal(first_frames(stored), first_frames(quantised, "fp8"))
    assert Engine(stored).precision == "fp8", "the default of such weights"
    shards = [sum(p.stat().st_size for p in (folder / x).glob("dit-*")) for x in ("tiny", "fp8")]
    assert shards[1] < shards[0]


def test_float8_cannot_turn_back(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision is bf16, but the model's weights are float8"):
        Engine(load(folder / "fp8", "cpu"), precision="bf16")
    with pytest.raises(InputError, match="float8 already"):
        convert(folder / "fp8", tmp_path / "out")
    convert(folder / "fp8", tmp_path / "again", fp8=True)
    assert torch.equal(
        first_frames(load(tmp_path / "again", "cpu")), first_frames(load(folder / "fp8", "cpu"))
    )
    model = tiny.model()
    for precision, then in (("bf16", "fp8"), ("fp8", "8bit"), ("8bit", "fp8")):
        session = Engine(model, precision=precision).session(PORTRAIT)
        Engine(model, precision=then)
        session.push_audio(torch.zeros(model.stream.chunk_samples))
        with pytest.raises(InputError, match="converted after this engine was made"):
            next(iter(session))


def test_attention_in_eight_bits_is_8bits_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    attend = ops.quantized_attention

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(q.shape)
        return attend(q, k, v)

    monkeypatch.setattr(ops, "quantized_attention", counted)
    model = load(folder / "fp8", "cpu")
    fp8 = first_frames(model, "fp8")
    assert calls == []
    assert not torch.equal(first_frames(model, "8bit"), fp8)
    assert len(calls) == model.stream.steps * model.dit.config.num_layers
    assert torch.equal(first_frames(model, "fp8"), fp8), "there is a way back"
    dit = DiT(tiny.DIT)
    dit.prepare(torch.float32, fp8=False, eight_bit_attention=True)
    with pytest.raises(ValueError, match="knows no chunks"):
        dit.blocks[0].self_attn(torch.zeros(1, 6, 48), torch.zeros(6, 12, 2), 3)


def test_a_float8_folder_without_a_scale_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for file in (folder / "tiny").iterdir():
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    layout = json.loads((folder / "tiny" / "flashtalk.json").read_text()) | {"fp8": True}
    (tmp_path / "bad" / "flashtalk.json").write_text(json.dumps(layout))
    with pytest.raises(CheckpointError, match=r"missing: .*weight_scale"):
        load(tmp_path / "bad", "cpu")


@pytest.mark.parametrize("eight_bit_attention", [False, True], ids=["fp8", "8bit"])
def test_one_step_in_float8_stays_near_bfloat16(eight_bit_attention: bool, figures: dict[str, Any]) -> None:
    """Wide enough that rounding averages out as in the 14B model: error of a few hundredths, not zero."""
    config = dataclasses.replace(tiny.DIT, dim=256, ffn_dim=512, num_heads=2)
    outputs = []
    for fp8 in (False, True):
        torch.manual_seed(0)
        dit = DiT(config)
        dit.prepare(torch.bfloat16, fp8=fp8, eight_bit_attention=fp8 and eight_bit_attention)
        g = torch.Generator().manual_seed(1)
        context = dit.context(torch.randn(1, 2, 8, generator=g), torch.randn(1, 5, 27, generator=g))
        audio = dit.audio_context(torch.randn(1, 5, 5, 4, 40, generator=g))
        latent, y = torch.randn(1, 16, 2, 4, 4, generator=g), torch.randn(1, 20, 2, 4, 4, generator=g)
        with torch.no_grad():
            outputs.append(dit(latent, torch.tensor([700.0]), y, context, audio).float())
    error = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
    figures[f"{'8bit' if eight_bit_attention else 'fp8'}_tiny_step_relative_error"] = round(error, 4)
    assert 1e-4 < error < 0.1


def test_fused_projections_share_their_weights_and_give_the_same() -> None:
    dit = DiT(tiny.DIT).eval()
    attention = dit.blocks[0].self_attn
    x = torch.randn(1, 6, 48)
    apart = [layer(x) for layer in (attention.q, attention.k, attention.v)]
    names = list(dit.state_dict())
    dit.prepare(torch.float32, fp8=False)
    fused = attention._fused
    for a, b in zip(apart, fused(x), strict=True):
        torch.testing.assert_close(a, b)
    weights = [layer.weight for layer in (attention.q, attention.k, attention.v)]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1, "nothing is held twice"
    assert list(dit.state_dict()) == names
    dit.prepare(torch.float32, fp8=False)
    assert attention._fused is fused
    dit.prepare(torch.bfloat16, fp8=False)
    assert attention._fused is not fused


def test_a_float8_input_needs_a_float8_weight() -> None:
    with pytest.raises(TypeError, match="needs a float8 weight"):
        Linear(16, 16)(ops.quantize(torch.randn(2, 16)))


def test_the_published_size_in_float8_on_meta() -> None:
    """18.9 B parameters: what the weights take."""
    with torch.device("meta"):
        dit = DiT(DiTConfig())
        for layer in dit.large_projections():
            layer.hold(ops.quantize(layer.weight))
    large = sum(p.numel() for p in dit.parameters() if p.dtype == ops.FP8)
    rest = sum(p.numel() for p in dit.parameters() if p.dtype != ops.FP8)
    assert large == 40 * (10 * 5120**2 + 2 * 5120 * 13824)
    assert 18.8e9 < large + rest < 19.0e9
    assert large + 2 * rest < 23e9, "bytes, everything else being bfloat16"


@pytest.mark.parametrize("lossy", FLOAT8)
def test_what_float8_costs_the_embedded_model(lossy: Precision, figures: dict[str, Any]) -> None:
    """With the bundled portrait and speech: one step, what its products read, and two chunks, the second made
    from the first; the model's own VAE reconstructs its world to 30 dB, and float8 must lose less than that,
    attention in eight bits not much more (the second chunk differs by some dB between CPUs).
    """
    assets = Path(ft.__file__).parent / "assets"
    portrait = assets / "portrait.png"
    samples = torch.from_numpy(np.concatenate(list(AudioReader(assets / "speech.flac"))))
    model = load("embedded", "cpu")
    model.label = ""
    stream = model.stream

    def speak(engine: Engine) -> list[Chunk]:
        session = engine.session(portrait, seed=1)
        session.push_audio(samples[: 2 * stream.chunk_samples])
        return list(session)

    engine = Engine(model, precision="bf16")
    with torch.no_grad():
        image = load_image(portrait, stream.height, stream.width)
        ring = samples[: round(stream.ring_s * stream.sample_rate_hz)]
        inputs = DiTInputs(
            torch.randn(engine.latent_shape(), generator=torch.Generator().manual_seed(1)),
            model.text_encoder("")[None],
            model.image_encoder(image),
            engine.audio_features(ring),
            reference_latent(model.vae, image, stream.frames),
        )
    result = fp8_quality(model, inputs, speak, lossy)
    crests = {name: [round(x, 1) for x in rows["crest_largest"]] for name, rows in result["inputs"].items()}
    figures[f"{lossy}_embedded_step_relative_error"] = round(result["step_relative_error"], 4)
    figures[f"{lossy}_embedded_block_relative_errors"] = [
        round(x, 4) for x in result["block_relative_errors"]
    ]
    figures[f"{lossy}_embedded_largest_crests_by_block"] = crests
    figures[f"{lossy}_embedded_psnr_to_bf16_db_by_chunk"] = [round(x, 2) for x in result["frames_psnr_db"]]
    assert 1e-3 < result["step_relative_error"] < 0.06
    assert max(result["block_relative_errors"]) < 0.06
    assert max(map(max, crests.values())) < 20
    assert len(result["frames_psnr_db"]) == 2
    assert min(result["frames_psnr_db"]) > {"fp8": 30, "8bit": 27}[lossy]

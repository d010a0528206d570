"""Converting to our layout and loading it: the same bits, nothing half done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_published
import torch
from checkpoints import PARTS, assert_same_bits, dit_state, problem, state
from safetensors.torch import load_file

from flashtalk_rt.errors import CheckpointError, InputError, OutputError
from flashtalk_rt.modules import convert as layout
from flashtalk_rt.modules import weights
from flashtalk_rt.modules.convert import convert, save_converted
from flashtalk_rt.modules.toy_encoders import MelAudioEncoder
from flashtalk_rt.modules.weights import load


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny published folder; read only."""
    return tiny_published.write_published(tmp_path_factory.mktemp("published") / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converting_changes_no_bit(
    original: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 60_000)
    convert(original, tmp_path / "out", dtype)
    shards = sorted(path.name for path in (tmp_path / "out").glob("dit-*"))
    assert len(shards) > 2 and shards[0] == f"dit-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 80_000 for name in shards)
    before, after = load(original, "cpu", dtype), load(tmp_path / "out", "cpu", dtype)
    assert_same_bits(state(before), state(after))
    assert before.dit.config == after.dit.config and before.vae.config == after.vae.config
    assert before.stream == after.stream
    prompt, image, sound = "a person .", torch.rand(1, 3, 1, 40, 40), torch.randn(8000)
    assert torch.equal(before.text_encoder(prompt), after.text_encoder(prompt))
    assert torch.equal(before.image_encoder(image), after.image_encoder(image))
    assert torch.equal(before.audio_encoder(sound, 12), after.audio_encoder(sound, 12))


def test_the_library_reads_what_we_write(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "out", torch.bfloat16)
    (shard,) = (tmp_path / "out").glob("dit-*")
    assert_same_bits(load_file(shard), dit_state(original))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "flashtalk.json",
        shard.name,
        "tokenizer",
        *(f"{name}.safetensors" for name in PARTS[1:]),
    }
    # Converting again, from our layout, gives the same tensors.
    convert(tmp_path / "out", tmp_path / "again", torch.bfloat16)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert_same_bits(load_file(tmp_path / "again" / path.name), load_file(path))


def test_a_toy_model_saves_and_loads(tmp_path: Path) -> None:
    model = tiny.model()
    model.label = "toy model"
    save_converted(model, tmp_path / "toy", torch.float32)
    after = load(tmp_path / "toy", "cpu", torch.float32)
    assert_same_bits(state(model), state(after))
    assert (after.dit.config, after.vae.config, after.stream, after.label) == (
        model.dit.config,
        model.vae.config,
        model.stream,
        "toy model",
    )
    sound, image = torch.randn(6400), torch.rand(1, 3, 1, 64, 48)
    assert isinstance(after.audio_encoder, MelAudioEncoder)
    assert torch.equal(model.audio_encoder(sound, 10), after.audio_encoder(sound, 10))
    assert torch.equal(model.image_encoder(image), after.image_encoder(image))
    assert torch.equal(model.text_encoder(""), after.text_encoder(""))


def test_loading_a_toy_does_not_wait_for_transformers(tmp_path: Path) -> None:
    save_converted(tiny.model(), tmp_path / "toy", torch.bfloat16)
    code = (
        "import sys; from flashtalk_rt.modules.weights import load; "
        f"load({str(tmp_path / 'toy')!r}, 'cpu'); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_embedded_means_the_package_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "EMBEDDED", tmp_path / "embedded")
    with pytest.raises(CheckpointError, match="embedded: no such folder"):
        load("embedded")
    save_converted(tiny.model(), tmp_path / "embedded", torch.float32)
    assert_same_bits(state(load("embedded", "cpu")), state(tiny.model()))


def test_saving_real_encoders_is_not_for_save_converted(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use `convert`"):
        save_converted(load(original, "cpu"), tmp_path / "out", torch.float32)


@pytest.fixture
def converted(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(layout, "SHARD_BYTES", 100_000)
    convert(original, tmp_path / "out")
    return tmp_path / "out"


def test_files_missing_from_our_layout_are_named_at_once(converted: Path) -> None:
    (last,) = converted.glob("dit-00002-of-*")
    for path in (last, converted / "vae.safetensors"):
        path.unlink()
    shutil.rmtree(converted / "tokenizer")
    message = problem(converted)
    assert last.name in message and "vae.safetensors" in message and "tokenizer/" in message


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "flashtalk.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=2), "format 2, but this version reads 1"),
        (lambda v: v.pop("vae"), "lacks settings vae"),
        (lambda v: v["dit"].update(depth=3), "dit has unknown settings depth"),
        (lambda v: v["dit"].pop("num_heads"), "dit lacks settings num_heads"),
        (lambda v: v["encoders"].pop("text_encoder"), "encoders lacks settings text_encoder"),
        (lambda v: v["encoders"]["text_encoder"].pop("heads"), "text_encoder cannot be made of"),
        (lambda v: v["encoders"]["image_encoder"].update(dim="a"), "image_encoder cannot be made of"),
        (lambda v: v["encoders"]["text_encoder"].update(kind="bert"), "unknown kind 'bert'"),
        (lambda v: v["dit"].update(num_layers=3), "missing: blocks.2."),
    ],
)
def test_a_broken_flashtalk_json(
    converted: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(converted, change)
    assert message in problem(converted)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "model"
    save_converted(tiny.model(), folder, torch.float32)
    return folder


@pytest.mark.parametrize(
    ("part", "key", "value", "wanted"),
    [
        ("", "min_portrait_psnr_db", "24", "a float from 0 on"),
        ("", "label", None, "text"),
        ("", "fp8", 0, "true or false"),
        ("", "stream", [], "an object"),
        ("dit", "num_heads", 0, "a positive int"),
        ("dit", "num_heads", 7, "divide dim 48"),
        ("dit", "dim", "a", "a positive int"),
        ("dit", "dim", True, "a positive int"),
        ("dit", "dim", 10**400, "a positive int"),
        ("dit", "eps", float("nan"), "a positive float"),
        ("dit", "audio_window", 4, "be odd"),
        ("vae", "latent_mean", [0.0, "x"], "a list, each a float"),
        ("vae", "latent_std", [1.0], "have z_dim 16 values"),
        ("vae", "dim_mult", 4, "a list, each a positive int"),
        ("stream", "fps", 0, "a positive int"),
        ("stream", "fps", 24, "16000; it must be a multiple of fps 24"),
        ("stream", "sampler", "heun", "one of renoise, adams_bashforth"),
        ("stream", "height", 100, "be a multiple of 16"),
        ("stream", "motion_frames", 33, "be less than frames 33"),
        ("stream", "ring_s", 1.0, "last as long as 33 frames"),
        ("stream", "steps", 1001, "be at most 1000"),
        ("encoders", "image_encoder", 3, "an object"),
        ("encoders", "image_encoder", {"kind": "toy", "grid": "a", "patch": 3}, "'grid': 16"),
        ("encoders", "text_encoder", {"kind": "toy", "dim": 8, "depth": 2}, "want {'dim': 8}"),
    ],
)
def test_a_setting_that_cannot_be(
    toy: Path, tmp_path: Path, part: str, key: str, value: object, wanted: str
) -> None:
    values = json.loads((toy / "flashtalk.json").read_text())
    (values[part] if part else values)[key] = value
    (tmp_path / "flashtalk.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        weights.read_checkpoint(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "flashtalk.json")) and key in message
    assert wanted in message and len(message.splitlines()) == 1


def test_a_damaged_flashtalk_json(converted: Path) -> None:
    (converted / "flashtalk.json").write_text('{"format": 1,')
    assert "flashtalk.json: damaged" in problem(converted)


def test_convert_refuses_to_overwrite(original: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        convert(original, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    with pytest.raises(InputError, match="no such folder"):
        convert(original, tmp_path / "no" / "out")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="not an empty folder"):
        convert(original, tmp_path / "loop")
    with pytest.raises(OutputError, match="File name too long"):
        convert(original, tmp_path / ("x" * 300))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    convert(original, tmp_path / "link")
    assert load(tmp_path / "empty", "cpu").dit.config == tiny_published.DIT


def test_convert_checks_the_disk_first(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 0, 1000))
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes, but its disk has 1,000 free"):
        convert(original, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(OSError(28, "No space left on device"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_interrupted_convert_leaves_nothing(
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    expected: type[BaseException],
) -> None:
    written = []

    def fsync(_: int) -> None:
        written.append(1)
        if len(written) == 2:
            raise raised

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(expected):
        convert(original, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

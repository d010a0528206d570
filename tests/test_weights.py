"""Loading and converting checkpoints: the same bits, one clear line for everything wrong, flat memory."""

from __future__ import annotations

import json
import os
import pickle
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashtalk_rt.config import DiTConfig
from flashtalk_rt.errors import CheckpointError, InputError, OutputError
from flashtalk_rt.modules import convert as layout
from flashtalk_rt.modules import published, weights
from flashtalk_rt.modules.convert import convert, load_converted, save_converted
from flashtalk_rt.modules.model import Model
from flashtalk_rt.modules.toy_encoders import MelAudioEncoder
from flashtalk_rt.modules.weights import load, open_pth

CPU = torch.device("cpu")
PARTS = ("dit", "vae", "audio_encoder", "image_encoder", "text_encoder")
SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny published folder; read only."""
    return tiny_published.write_published(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def state(model: Model) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in PARTS:
        network = getattr(model, name)
        if isinstance(network, nn.Module):
            found |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
    return found


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.device == other[name].device, name
        assert torch.equal(value, other[name]), name


def problem(source: Path) -> str:
    """The one line that loading `source` fails with."""
    with pytest.raises(CheckpointError) as error:
        load(source, "cpu", torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the published layout


def dit_state(folder: Path) -> dict[str, Tensor]:
    parts = [load_file(path) for path in folder.glob("diffusion*.safetensors")]
    return {name: value for part in parts for name, value in part.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_folder_loads_every_weight_in_its_dtype(original: Path, dtype: torch.dtype) -> None:
    model = load(original, "cpu", dtype)
    assert model.dit.config == tiny_published.DIT and model.vae.config == tiny_published.VAE_CONFIG
    assert model.label == "" and model.stream.height == 768
    dit = model.dit.state_dict()
    assert_same_bits(dit, {k: v.to(dtype) for k, v in dit_state(original).items()})
    stored = torch.load(original / published.VAE_FILE, weights_only=True)
    assert_same_bits(model.vae.state_dict(), {k: v.float() for k, v in stored.items()})
    assert {p.dtype for p in model.text_encoder.parameters()} == {torch.bfloat16}  # type: ignore[attr-defined]
    small = [*model.audio_encoder.parameters(), *model.image_encoder.parameters()]  # type: ignore[attr-defined]
    assert {p.dtype for p in small} == {torch.float32}
    for network in model.networks():
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_the_encoders_of_a_loaded_folder_run(original: Path) -> None:
    model = load(original, "cpu", torch.float32)
    assert model.audio_encoder(torch.randn(16_000), 25).shape == (25, 2, 32)
    assert model.image_encoder(torch.zeros(1, 3, 1, 64, 48)).shape == (1, 5, 80)
    text = model.text_encoder("a person is talking.")
    assert text.shape == (6, 32) and text.isfinite().all()


def test_the_defaults_on_a_machine_without_cuda_are_cpu_and_float32(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = load(original)
    assert model.device == CPU and model.dit.dtype == torch.float32


def test_one_file_without_an_index_and_the_audio_folder_beside(original: Path, folder: Path) -> None:
    state_before = dit_state(folder)
    for path in folder.glob("diffusion*"):
        path.unlink()
    save_file(state_before, folder / "diffusion_pytorch_model.safetensors")
    audio = folder / published.AUDIO_FOLDER
    audio.rename(folder.parent / published.AUDIO_FOLDER)
    pth = torch.load(folder.parent / published.AUDIO_FOLDER / "pytorch_model.bin", weights_only=True)
    save_file(pth, folder.parent / published.AUDIO_FOLDER / "model.safetensors")
    (folder.parent / published.AUDIO_FOLDER / "pytorch_model.bin").unlink()
    before, after = load(original, "cpu", torch.float32), load(folder, "cpu", torch.float32)
    assert_same_bits(state(before), state(after))


def test_loaded_weights_do_not_depend_on_the_files(folder: Path) -> None:
    model = load(folder, "cpu", torch.bfloat16)  # the stored dtype of the DiT: nothing to cast
    before = {name: value.clone() for name, value in state(model).items()}
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".pth", ".bin"):
            with path.open("r+b") as file:
                file.write(b"\xff" * path.stat().st_size)
    assert_same_bits(state(model), before)


# --- what can be wrong with it


def test_every_missing_file_is_named_at_once(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / published.CLIP_FILE).unlink()
    (folder / SHARD).unlink()
    shutil.rmtree(folder / published.TOKENIZER)
    (folder / published.AUDIO_FOLDER / "pytorch_model.bin").unlink()
    message = problem(folder)
    for name in ("config.json", published.CLIP_FILE, SHARD, "umt5-xxl/tokenizer.json", "pytorch_model.bin"):
        assert name in message
    assert published.VAE_FILE not in message


def test_an_empty_and_an_absent_folder(tmp_path: Path) -> None:
    message = problem(tmp_path)
    for name in ("config.json", "diffusion_pytorch_model*", published.VAE_FILE, published.AUDIO_FOLDER):
        assert name in message
    assert "no such folder" in problem(tmp_path / "absent")


def change_shard(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)


def test_parameters_missing_unexpected_and_misshapen_are_named(folder: Path) -> None:
    name = next(iter(load_file(folder / SHARD)))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.7.extra"] = tensors.pop(name)

    change_shard(folder, change)
    message = problem(folder)
    assert f"missing: {name}" in message and "unexpected: blocks.7.extra" in message


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    name = "blocks.0.ffn.0.weight"
    (path,) = (path for path in folder.glob("diff*.safetensors") if name in load_file(path))
    save_file({**load_file(path), name: torch.zeros(65, 48)}, path)
    assert "blocks.0.ffn.0.weight is [65, 48] where [64, 48] is expected" in problem(folder)


def test_nothing_is_read_before_everything_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torch.load(folder / published.TEXT_FILE, weights_only=True)
    stored["norm.weight"] = torch.zeros(3)
    torch.save(stored, folder / published.TEXT_FILE)

    def fail(*_: Any) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(weights, "fill", fail)
    assert "norm.weight is [3] where [32] is expected" in problem(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_safetensors(folder: Path, kept: int) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:kept])
    message = problem(folder)
    assert SHARD in message and "truncated" in message


@pytest.mark.parametrize("kept", [0, 100, -1, -30])
def test_a_truncated_pth(folder: Path, kept: int) -> None:
    path = folder / published.VAE_FILE
    path.write_bytes(path.read_bytes()[:kept])
    message = problem(folder)
    assert published.VAE_FILE in message and "get the file again" in message


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pth_with_code_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    path, fired = folder / published.TEXT_FILE, tmp_path / "fired"
    torch.save({"a": Bomb(fired)}, path)
    message = problem(folder)
    assert published.TEXT_FILE in message and "refused" in message and "torch.save" in message
    assert not fired.exists()
    path.write_bytes(pickle.dumps(Bomb(fired)))
    assert published.TEXT_FILE in problem(folder) and not fired.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [([torch.zeros(2)], "a list"), ({"a": {"b": torch.zeros(2)}}, "a dict under 'a'"), ({"n": 3}, "a int")],
)
def test_a_pth_of_something_else_is_refused(tmp_path: Path, content: Any, found: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth: refused, it holds {found}"):
        open_pth(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="refused, it holds a TorchScript program"):
        open_pth(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dims": 5}, "unknown keys dims"),
        ({"qk_norm": False}, "qk_norm is False, but only True"),
        ({"patch_size": [1, 4, 4]}, r"patch_size is \[1, 4, 4\]"),
        ({"num_layers": "forty"}, "num_layers is 'forty', expected a positive int"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dim": 50, "num_heads": 4}, "does not divide"),
    ],
)
def test_a_config_of_another_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        published.dit_config(values, "config.json")


def test_the_published_config_keys_are_known() -> None:
    values = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": 5120,
        "eps": 1e-06,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "in_dim": 36,
        "model_type": "i2v",
        "num_heads": 40,
        "num_layers": 40,
        "out_dim": 16,
        "text_len": 512,
    }
    assert published.dit_config(values, "config.json") == DiTConfig()


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.json" in problem(folder)


def test_encoders_of_another_model(folder: Path) -> None:
    torch.save(tiny_published.random_state(tiny_published.umt5_shapes(dim=16)), folder / published.TEXT_FILE)
    message = problem(folder)
    assert "text encoder's width (16)" in message and "text_dim (32)" in message
    torch.save({"a": torch.zeros(1)}, folder / published.TEXT_FILE)
    assert "token_embedding.weight is missing" in problem(folder)


def test_integers_are_not_weights(folder: Path) -> None:
    stored = torch.load(folder / published.VAE_FILE, weights_only=True)
    stored["conv1.bias"] = stored["conv1.bias"].to(torch.int8)
    torch.save(stored, folder / published.VAE_FILE)
    assert "conv1.bias is torch.int8" in problem(folder)


# --- our layout


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
    after = load_converted(tmp_path / "toy", CPU, torch.float32)
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
        (lambda v: v.pop("vae"), "damaged or incomplete"),
        (lambda v: v["dit"].update(depth=3), "unknown settings ['depth'] for DiTConfig"),
        (lambda v: v["encoders"].pop("text_encoder"), "damaged or incomplete"),
        (lambda v: v["encoders"]["text_encoder"].update(kind="bert"), "unknown kind 'bert'"),
        (lambda v: v["dit"].update(num_layers=3), "missing: blocks.2."),
    ],
)
def test_a_broken_flashtalk_json(
    converted: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(converted, change)
    assert message in problem(converted)


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
    (tmp_path / "empty").mkdir()
    convert(original, tmp_path / "empty")
    assert load(tmp_path / "empty", "cpu").dit.config == tiny_published.DIT


def test_convert_checks_the_disk_first(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 0, 1000))
    with pytest.raises(OutputError, match=r"needs 0\.0 GB"):
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

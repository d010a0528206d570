"""Loading the published layout: every weight as it is stored, one clear line for everything wrong."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_published
import torch
from checkpoints import assert_same_bits, dit_state, problem, state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashtalk_rt.config import DiTConfig
from flashtalk_rt.errors import CheckpointError
from flashtalk_rt.modules import published, weights
from flashtalk_rt.modules.weights import load, open_pth

CPU = torch.device("cpu")
SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny published folder; read only."""
    return tiny_published.write_published(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(original, tmp_path / "model"))


# --- what loads


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
        ({"dims": 5}, "unknown settings dims"),
        ({"qk_norm": False}, "qk_norm is False, but only True"),
        ({"patch_size": [1, 4, 4]}, r"patch_size is \[1, 4, 4\]"),
        ({"num_layers": "forty"}, "num_layers is 'forty'; it must be a positive int"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dim": 50, "num_heads": 4}, "num_heads is 4; it must divide dim 50"),
    ],
)
def test_a_config_of_another_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json.* {message}"):
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

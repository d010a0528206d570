"""What the `flashtalk` command refuses: one line, exit code 2, and no file touched."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from command import ROOT, arguments, one_error, run, write_inputs
from media_files import RATE, tone, write_broken_mp3, write_wav
from PIL import Image
from safetensors.torch import load_file, save_file

from flashtalk_rt.cli import main
from flashtalk_rt.modules import weights
from flashtalk_rt.modules.model import Model
from flashtalk_rt.runtime import Engine


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, face.png and speech.wav (3 s)."""
    return write_inputs(tmp_path_factory.mktemp("shared"))


def image_case(name: str, folder: Path, shared: Path) -> Path:
    path = folder / name
    if name == "text.png":
        path.write_text("no picture")
    elif name == "cut.png":
        path.write_bytes((shared / "face.png").read_bytes()[:5000])
    elif name == "bomb.png":
        Image.new("1", (12_000, 12_000)).save(path)
    elif name == "small.png":
        Image.new("RGB", (63, 63)).save(path)
    return path


def audio_case(name: str, folder: Path) -> Path:
    path = folder / name
    if name == "empty.wav":
        path.write_bytes(b"")
    elif name == "zero.wav":
        write_wav(path, np.zeros(0))
    elif name == "text.wav":
        path.write_text("no sound" * 100)
    elif name == "nan.wav":
        write_wav(path, np.append(tone(2, RATE), np.nan))
    elif name == "broken.mp3":
        write_broken_mp3(path)
    return path


PATHS = ("image", "audio", "out", "checkpoint")
CHEAP = [
    ("image", "missing.png", "does not exist"),
    ("image", "text.png", "not a picture"),
    ("image", "cut.png", "truncated"),
    ("image", "bomb.png", "decompression bomb"),
    ("image", "small.png", "63 x 63"),
    ("audio", "missing.wav", "does not exist"),
    ("audio", "empty.wav", "empty file"),
    ("audio", "zero.wav", "gives no sample at 16000 Hz"),
    ("audio", "text.wav", "not a readable sound file"),
    ("audio", "nan.wav", "nan at 2.00 s"),
    ("audio", "broken.mp3", "cannot be decoded after 0."),
    ("audio", "face.png", "no audio stream"),
    ("size", "100x64", "not a multiple of 16 from 16 to 16384; the nearest is 96"),
    ("size", "64x50", "width 50 is not a multiple of 16"),
    ("size", "0x64", "height 0"),
    ("size", "99999x64", "the nearest is 16384"),
    ("size", "big", "HEIGHTxWIDTH"),
    ("steps", "0", "--steps is 0"),
    ("steps", "-3", "--steps is -3"),
    ("steps", "9" * 20, "from 1 to 1000"),
    ("steps", "four", "--steps"),
    ("seed", "-1", "--seed"),
    ("precision", "fp16", "fp32, bf16, fp8, 8bit"),
    ("device", "tpu", "cpu, cuda"),
    ("out", "none/a.mp4", "does not exist"),
    ("out", "a.avi", "must end in .mp4"),
    ("out", "/proc/a.mp4", "cannot be written"),
    ("out", ".", "is a folder"),
    ("nonsense", "1", "--nonsense"),
]


@pytest.mark.parametrize(("option", "value", "text"), CHEAP, ids=[f"{o} {v}" for o, v, _ in CHEAP])
def test_the_real_command_refuses_in_one_line(
    shared: Path, tmp_path: Path, option: str, value: str, text: str
) -> None:
    """Before torch is imported, and without touching a file that is already there."""
    out = tmp_path / "a.mp4"
    out.write_bytes(b"an older video")
    given: str | Path = value
    if option == "image":
        given = image_case(value, tmp_path, shared)
    elif option == "audio":
        given = shared / value if value == "face.png" else audio_case(value, tmp_path)
    elif option == "out":
        given = tmp_path / value
    code, _, err = run(arguments(shared, out, **{option: given}))
    assert text in one_error(code, err)
    if option in ("image", "audio", "out"):
        assert str(given) in err
    assert out.read_bytes() == b"an older video"


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        *((option, "x" * 300, "File name too long") for option in PATHS),
        *((option, "locked/a.mp4", "Permission denied") for option in PATHS),
        ("image", "https://example.org/face.png", "download it first"),
        ("audio", "https://example.org/speech.wav", "download it first"),
        ("out", "loop.mp4", "symbolic links"),
        ("out", "dangling.mp4", "none does not exist"),
        ("out", "pipe.mp4", "a pipe"),
        ("size", "10000x10000", "take a smaller size"),
    ],
)
def test_paths_that_cannot_be_looked_at(
    shared: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    text: str,
) -> None:
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "none" / "a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    stat = Path.stat

    def as_another_user(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.parent.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", as_another_user)
    given = value if ":" in value or option == "size" else tmp_path / value
    before = sorted(tmp_path.iterdir())
    code = main(arguments(shared, tmp_path / "a.mp4", **{option: given}))
    line = one_error(code, capfd.readouterr().err)
    assert text in line and Path(value).name.replace("10000x10000", "10000 x 10000") in line
    assert sorted(tmp_path.iterdir()) == before


def test_any_other_path_is_named_too(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    code = main(["train", "world-vae", "--run", str(folder), "--device", "cpu"])
    assert f"{folder}: Not a directory" in one_error(code, capfd.readouterr().err)


def out_of_memory(device: str) -> None:
    if device == "cpu":
        torch.empty(1 << 60, dtype=torch.uint8)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\nmore to say.")


@pytest.mark.parametrize(("device", "asked"), [("cpu", "1152921504606846976 bytes"), ("cuda", "20.00 GiB")])
def test_too_large_for_the_memory_is_one_line(
    shared: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    asked: str,
) -> None:
    monkeypatch.setattr(Engine, "session", lambda *_: out_of_memory(device))
    line = one_error(main(arguments(shared, tmp_path / "a.mp4")), capfd.readouterr().err)
    assert asked in line and "smaller --size" in line


def test_a_bug_of_ours_is_no_complaint(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "session", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(arguments(shared, shared / "a.mp4"))


def test_a_missing_option_is_one_line(shared: Path) -> None:
    code, _, err = run(["generate", "--image", str(shared / "face.png")])
    assert "--audio" in one_error(code, err)


def test_nothing_slow_is_imported_before_the_checks() -> None:
    code = (
        "import sys; from flashtalk_rt.cli import main\n"
        "assert main(['--version']) == 0\n"
        "assert not {'torch', 'av', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert main('generate --image none --audio none --out /tmp/none.mp4'.split()) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("name", ["image", "audio"])
def test_an_input_is_never_overwritten(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    source = tmp_path / "in.mp4"
    shutil.copy(shared / {"image": "face.png", "audio": "speech.wav"}[name], source)
    data = source.read_bytes()
    (tmp_path / "link.mp4").symlink_to(source)
    code = main(arguments(shared, tmp_path / "link.mp4", **{name: source}))
    assert f"the --{name} file itself" in one_error(code, capfd.readouterr().err)
    assert source.read_bytes() == data


def test_a_gpu_that_is_not_there_is_refused(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    device = f"cuda:{torch.cuda.device_count()}"
    code = main(arguments(shared, tmp_path / "a.mp4", device=device))
    assert f"--device is {device}" in one_error(code, capfd.readouterr().err)


def test_a_picture_from_another_world_is_refused(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a photograph is by the embedded model."""
    load = weights.load

    def strict(*values: object) -> Model:
        return dataclasses.replace(load(*values), min_portrait_psnr_db=60.0)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "load", strict)
    code = main(arguments(shared, tmp_path / "a.mp4"))
    assert "--checkpoint" in one_error(code, capfd.readouterr().err)
    assert not (tmp_path / "a.mp4").exists()


def test_the_embedded_model_refuses_a_photograph(shared: Path, tmp_path: Path) -> None:
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "photograph.jpg")
    image, out = tmp_path / "photograph.jpg", tmp_path / "a.mp4"
    code, _, err = run(arguments(shared, out, image=image, checkpoint="embedded"))
    assert "--checkpoint" in one_error(code, err)
    assert not out.exists()


def checkpoint_case(kind: str, shared: Path, folder: Path) -> Path:
    if kind == "no folder":
        return folder / "none"
    target = folder / "checkpoint"
    if kind == "pickle":
        return published_with_pickle(target)
    shutil.copytree(shared / "model", target)
    dit = next(target.glob("dit-*.safetensors"))
    if kind == "missing":
        (target / "vae.safetensors").unlink()
        dit.unlink()
    elif kind == "shape":
        tensors = load_file(dit)
        tensors["head.head.bias"] = torch.zeros(3)
        save_file(tensors, dit)
    elif kind == "truncated":
        dit.write_bytes(dit.read_bytes()[:-1000])
    elif kind == "setting":
        layout = json.loads((target / "flashtalk.json").read_text())
        layout["dit"]["num_heads"] = 7
        (target / "flashtalk.json").write_text(json.dumps(layout))
    elif kind == "json":
        (target / "flashtalk.json").write_text("{")
    return target


class Program:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def published_with_pickle(folder: Path) -> Path:
    """A folder whose names are the published ones, and whose VAE file holds a program."""
    audio = folder / "chinese-wav2vec2-base"
    tokenizer = folder / "google" / "umt5-xxl"
    for path in (audio, tokenizer):
        path.mkdir(parents=True)
    for path in (folder, audio):
        (path / "config.json").write_text(json.dumps({}))
    (tokenizer / "tokenizer.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    names = ("models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    for path in (*(folder / name for name in names), audio / "pytorch_model.bin"):
        torch.save({"x": torch.zeros(1)}, path)
    with zipfile.ZipFile(folder / "Wan2.1_VAE.pth", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"x": Program(folder / "it ran")}, protocol=2))
        file.writestr("archive/version", "3\n")
    return folder


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("no folder", ["none"]),
        ("missing", ["vae.safetensors", "dit-00001-of-00001.safetensors"]),
        ("shape", ["head.head.bias", "[3]", "[64]"]),
        ("truncated", ["dit-00001-of-00001.safetensors", "truncated"]),
        ("json", ["flashtalk.json"]),
        ("setting", ["flashtalk.json: dit: num_heads is 7"]),
        ("pickle", ["Wan2.1_VAE.pth", "refused"]),
    ],
)
def test_a_bad_checkpoint_is_one_line(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, texts: list[str]
) -> None:
    out = tmp_path / "a.mp4"
    out.write_bytes(b"an older video")
    folder = checkpoint_case(kind, shared, tmp_path)
    code = main(arguments(shared, out, checkpoint=folder))
    line = one_error(code, capfd.readouterr().err)
    assert [text for text in texts if text not in line] == []
    assert out.read_bytes() == b"an older video"
    assert not (folder / "it ran").exists()


def test_the_program_in_the_pickle_would_run(tmp_path: Path) -> None:
    """So that the test above can fail."""
    folder = published_with_pickle(tmp_path / "checkpoint")
    with zipfile.ZipFile(folder / "Wan2.1_VAE.pth") as file:
        pickle.loads(file.read("archive/data.pkl"))
    assert (folder / "it ran").exists()


@pytest.mark.parametrize("asked", [None, "active"])
def test_threads_sleep_unless_the_environment_says_otherwise(asked: str | None) -> None:
    code = (
        "import os, sys; from flashtalk_rt import cli\n"
        "cli.main = lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n"
        "cli.entry()"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {} if asked is None else {"OMP_WAIT_POLICY": asked}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [asked or "passive", "False"]

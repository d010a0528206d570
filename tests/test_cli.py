"""The `flashtalk` command: what it makes, every refusal in one line, and what stopping it leaves.

What needs no network runs as a real process; the rest calls `main`, which is all such a process does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_media import RATE, encode, tone, write_wav
from tiny import model as tiny_model

from flashtalk_rt.cli import main
from flashtalk_rt.media import VideoWriter, playable_s
from flashtalk_rt.modules import weights
from flashtalk_rt.modules.convert import save_converted
from flashtalk_rt.modules.model import Model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, face.png and speech.wav (3 s)."""
    folder = tmp_path_factory.mktemp("shared")
    random = tiny_model()
    random.label = "toy model"
    save_converted(random, folder / "model", torch.float32)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8)).save(
        folder / "face.png"
    )
    write_wav(folder / "speech.wav", tone(3, RATE))
    return folder


def arguments(shared: Path, out: Path, /, **changes: str | Path) -> list[str]:
    options: dict[str, str | Path] = {
        "image": shared / "face.png",
        "audio": shared / "speech.wav",
        "out": out,
        "checkpoint": shared / "model",
        **changes,
    }
    return ["generate", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def start(command: list[str], most_kib: int | None = None) -> subprocess.Popen[str]:
    """The real command; beyond `most_kib` a file cannot grow: as on a full disk, but EFBIG."""
    real = [sys.executable, "-m", "flashtalk_rt", *command]
    if most_kib is not None:
        real = ["sh", "-c", f'ulimit -f {2 * most_kib} && exec "$@"', "sh", *real]
    return subprocess.Popen(real, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(command: list[str], most_kib: int | None = None) -> tuple[int, str, str]:
    process = start(command, most_kib)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def one_error(code: int, err: str) -> str:
    """The text of the only line on stderr."""
    lines = err.splitlines()
    assert code == 2, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def pictures(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


# What it makes


def test_the_real_command_makes_a_video(shared: Path, tmp_path: Path) -> None:
    code, out, err = run(arguments(shared, tmp_path / "a.mp4"))
    assert (code, err) == (0, "")
    assert re.search(r"75 frames, 3\.00 s of video in .* frames/s; .* s of compute per second of video", out)
    assert len(pictures(tmp_path / "a.mp4")) == 75
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"].startswith("toy model: AI-generated")
        assert (container.streams.video[0].height, container.streams.video[0].width) == (64, 48)


@pytest.mark.parametrize("samples", [1, 500, 4_800, 17_920, 18_000, 36_500])
def test_the_video_lasts_as_long_as_the_sound(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], samples: int
) -> None:
    """From one sample to two chunks and a bit, all of it silence, which is a sound like any other."""
    audio = write_wav(tmp_path / "a.wav", np.zeros(samples))
    assert main(arguments(shared, tmp_path / "a.mp4", audio=audio)) == 0
    made_s = len(pictures(tmp_path / "a.mp4")) / 25
    assert abs(made_s - samples / RATE) <= 1 / 25
    assert f"{made_s:.2f} s of video" in capfd.readouterr().out


def test_other_rates_sizes_and_options(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encode(tmp_path / "a.mp3", np.tile(tone(1.3, 44_100), (2, 1)), "libmp3lame", 44_100, "stereo", None)
    Image.open(shared / "face.png").convert("CMYK").save(tmp_path / "a.jpg")
    options = {"audio": tmp_path / "a.mp3", "image": tmp_path / "a.jpg", "size": "80x64", "steps": "1"}
    made = []
    for seed in ("7", "7", "8"):
        command = arguments(shared, tmp_path / "a.mp4", **options, seed=seed, precision="fp32", device="cpu")
        assert main(command) == 0
        frames = pictures(tmp_path / "a.mp4")
        assert abs(len(frames) / 25 - 1.3) <= 1 / 25
        assert (frames[0].height, frames[0].width) == (80, 64)
        made.append(frames[10].to_ndarray(format="rgb24"))
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    assert capfd.readouterr().err == ""


def test_the_embedded_model_says_that_it_is_a_toy(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "EMBEDDED", shared / "model")
    command = [text for text in arguments(shared, tmp_path / "a.mp4") if text != "--checkpoint"][:-1]
    assert main(command) == 0
    assert main([*command, "--prompt", "A dog."]) == 0
    plain, prompted = [line for line in capfd.readouterr().out.splitlines() if line.startswith("embedded")]
    assert "toy" in plain and "ignored" not in plain
    assert "toy" in prompted and "--prompt is ignored" in prompted


# What it refuses


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
    rng = np.random.default_rng(0)
    if name == "empty.wav":
        path.write_bytes(b"")
    elif name == "zero.wav":
        write_wav(path, np.zeros(0))
    elif name == "text.wav":
        path.write_text("no sound" * 100)
    elif name == "nan.wav":
        write_wav(path, np.append(tone(2, RATE), np.nan))
    elif name == "broken.mp3":
        encode(path, rng.uniform(-0.5, 0.5, (2, 66_150)), "libmp3lame", 44_100, "stereo", None)
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 3000] = rng.bytes(3000)
        path.write_bytes(data)
    return path


CHEAP = [
    ("image", "missing.png", "does not exist"),
    ("image", "text.png", "not a picture"),
    ("image", "cut.png", "truncated"),
    ("image", "bomb.png", "decompression bomb"),
    ("image", "small.png", "63 x 63"),
    ("audio", "missing.wav", "does not exist"),
    ("audio", "empty.wav", "empty file"),
    ("audio", "zero.wav", "no samples"),
    ("audio", "text.wav", "not a readable sound file"),
    ("audio", "nan.wav", "nan at 2.00 s"),
    ("audio", "broken.mp3", "cannot be decoded after 0."),
    ("audio", "face.png", "no audio stream"),
    ("size", "100x64", "not divisible by 16; the nearest is 96"),
    ("size", "64x50", "width 50 is not divisible by 16"),
    ("size", "0x64", "height 0"),
    ("size", "big", "HEIGHTxWIDTH"),
    ("steps", "0", "--steps is 0"),
    ("steps", "-3", "--steps is -3"),
    ("steps", "four", "--steps"),
    ("seed", "-1", "--seed"),
    ("precision", "fp16", "fp32, bf16, fp8"),
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


def test_a_full_disk_is_one_line_and_what_was_written_plays(shared: Path, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, 20 * RATE))

    out = tmp_path / "a.mp4"
    code, _, err = run(arguments(shared, out, audio=tmp_path / "a.wav"), most_kib=60)
    line = one_error(code, err)
    kept_s = playable_s(out)
    assert str(out) in line and f"{kept_s:.2f} s of video are kept" in line
    assert 0 < kept_s < 20
    assert len(pictures(out)) == round(kept_s * 25)


# What stopping it leaves


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_made_before_a_signal_plays(shared: Path, tmp_path: Path, number: signal.Signals) -> None:
    write_wav(tmp_path / "a.wav", tone(300, RATE))
    out = tmp_path / "a.mp4"
    process = start(arguments(shared, out, audio=tmp_path / "a.wav"))
    deadline = time.monotonic() + 60
    while not (out.exists() and playable_s(out) > 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    frames = len(pictures(out))
    assert frames > 25
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert err.splitlines() == [f"interrupted: {frames / 25:.2f} s of video are kept in {out}"]


def test_ctrl_c_keeps_every_finished_chunk(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = VideoWriter.write, []

    def and_press(writer: VideoWriter, *values: object) -> None:
        write(writer, *values)  # type: ignore[arg-type]
        written.append(writer.frames)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(VideoWriter, "write", and_press)
    assert main(arguments(shared, tmp_path / "a.mp4")) == 130
    assert written == [28, 56]
    assert capfd.readouterr().err == f"interrupted: 2.24 s of video are kept in {tmp_path / 'a.mp4'}\n"
    assert len(pictures(tmp_path / "a.mp4")) == 56


def test_ctrl_c_before_the_first_frame_keeps_the_older_file(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.mp4"
    out.write_bytes(b"an older video")
    monkeypatch.setattr(weights, "load", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    assert main(arguments(shared, out)) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert capfd.readouterr().err == "interrupted: nothing was written\n"
    assert out.read_bytes() == b"an older video"


# The other commands


def test_convert_rewrites_a_folder(shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(shared / "model"), str(tmp_path / "new"), "--precision", "fp32"]) == 0
    assert main(arguments(shared, tmp_path / "a.mp4", checkpoint=tmp_path / "new")) == 0
    for folder, out, options, text in (
        (shared / "model", tmp_path / "new", [], "exists"),
        (tmp_path / "none", tmp_path / "newer", [], "none"),
        (shared / "model", tmp_path / "newer", ["--precision", "fp16"], "fp16"),
    ):
        capfd.readouterr()
        code = main(["convert", str(folder), str(out), *options])
        assert text in one_error(code, capfd.readouterr().err)


def test_version_help_and_doctor(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"flashtalk \d+\.\d+\.\d+\n", capfd.readouterr().out)
    assert main([]) == 0
    shown = capfd.readouterr().out
    assert [name for name in ("generate", "convert", "doctor", "train") if name not in shown] == []
    assert main(["doctor"]) == 0
    assert "chunk_attention" in capfd.readouterr().out
    assert main(["dance"]) == 2
    assert "dance" in one_error(2, capfd.readouterr().err)


def test_train_hands_its_arguments_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "world-base" in capfd.readouterr().out
    assert main(["train", "nothing"]) == 2
    assert "nothing" in one_error(2, capfd.readouterr().err)

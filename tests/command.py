"""The `flashtalk` command for the tests: inputs for it, a small model among them, and a real process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import torch
from media_files import RATE, tone, write_wav
from PIL import Image
from tiny import model as tiny_model

from flashtalk_rt.modules.convert import save_converted

ROOT = Path(__file__).parents[1]


def write_inputs(folder: Path) -> Path:
    """Fill `folder` with model/, face.png and speech.wav (3 s); returns it."""
    random = tiny_model()
    random.label = "toy model"
    save_converted(random, folder / "model", torch.float32)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8)).save(
        folder / "face.png"
    )
    write_wav(folder / "speech.wav", tone(3, RATE))
    return folder


def arguments(shared: Path, out: Path, /, **changes: str | Path) -> list[str]:
    """`generate` with the inputs in `shared`; `changes` are other options, or other values of these."""
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
    """As `start`, to the end: exit code, stdout and stderr."""
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
    """Every frame of a video file."""
    with av.open(str(path)) as container:
        return list(container.decode(video=0))

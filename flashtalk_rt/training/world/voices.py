"""Held-out speech: espeak-ng voices that training never hears."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import wave
from pathlib import Path

import numpy as np
import soxr
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError, InputError
from .speech import SAMPLE_RATE_HZ

# (espeak-ng voice, words a minute): men, women and children, several accents and languages.
VOICES = (
    ("en-us", 150), ("en-us+f2", 160), ("en-us+m3", 140), ("en-gb+f4", 170),
    ("en-gb+m7", 150), ("en-gb-scotland+f1", 155), ("en-gb-x-rp+m2", 165), ("en-us+f5", 145),
    ("en-us+m5", 175), ("en-gb+f3", 150), ("de+f2", 150), ("fr+m4", 150),
    ("es+f1", 160), ("it+m1", 155), ("pt-br+f3", 150), ("en-us+klatt2", 150),
)  # fmt: skip
TEXTS = (
    "Good morning. I was a portrait until a moment ago, and now I am talking to you. Every sound that you "
    "hear opens or closes my mouth a little. When I stop, it closes. Listen: one, two, three, four, five. "
    "The weather today is mostly cloudy, with a chance of rain in the afternoon, so take an umbrella and "
    "walk slowly. Afterwards we could meet by the old harbour and watch the boats come home.",
    "A short story. An engineer wanted to know why the machine was slow. She measured it, wrote the number "
    "down, and changed one thing. Then she measured again. Nothing had moved. She smiled, because now she "
    "knew what it was not. Over the next hours she asked better questions, and by the evening the fans "
    "were quiet, the frames arrived in time, and the whole room heard a stranger say hello.",
)
SECONDS = 25


def write_voices(path: Path) -> None:
    """Write `voices` [len(VOICES) * len(TEXTS), SECONDS * 16000] int16.  InputError without espeak-ng."""
    if shutil.which("espeak-ng") is None:
        raise InputError("espeak-ng is not installed; install it (Debian: apt-get install espeak-ng)")
    recordings = [_speak(voice, rate, text) for voice, rate in VOICES for text in TEXTS]
    save_file({"voices": torch.stack(recordings)}, str(path))


def read_voices(path: Path) -> Tensor:
    """What `write_voices` wrote, as float32 in [-1, 1]."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; make it with `flashtalk train world-voices {path}`")
    return load_file(str(path))["voices"].float() / 32768


def _speak(voice: str, words_a_minute: int, text: str) -> Tensor:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["espeak-ng", "-v", voice, "-s", str(words_a_minute), "-w", file.name, text]
        subprocess.run(command, check=True)
        with wave.open(file.name) as reader:
            rate = reader.getframerate()
            data = np.frombuffer(reader.readframes(reader.getnframes()), dtype=np.int16)
    sound = torch.from_numpy(soxr.resample(data, rate, SAMPLE_RATE_HZ).copy())
    wanted = SECONDS * SAMPLE_RATE_HZ
    # A fast speaker starts over rather than fall silent.
    return sound.repeat(-(-wanted // len(sound)))[:wanted]

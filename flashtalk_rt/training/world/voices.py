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

# (espeak-ng voice, words a minute): women, men and elders, several accents and languages.  Chosen anew
# on 2026-11-24: no earlier evaluation, and nothing of the synthesizer's design, heard these speakers.
VOICES = (
    ("en-us+belinda", 150), ("en-us+adam", 160), ("en-gb+Annie", 145), ("en-gb+caleb", 165),
    ("en-029+linda", 150), ("en-029+ed", 155), ("en-gb-x-gbcwmd+steph", 160), ("en-gb-x-gbcwmd+max", 150),
    ("nl+anika", 150), ("sv+Mike", 155), ("pl+grandma", 145), ("ro+victor", 160),
    ("fi+Alicia", 150), ("hu+Gene", 150), ("cs+Andrea", 155), ("tr+paul", 150),
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

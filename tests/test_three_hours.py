"""Three hours of sound through the real command: the video is as long, the memory stays flat."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from flashtalk_rt.media import playable_s
from flashtalk_rt.modules.convert import save_converted

HOURS = 3
RATE = 16_000
ALLOWED_GROWTH_MB = 30.0


def write_speech(path: Path, seconds: int) -> None:
    """Noise bursts as FLAC, a minute at a time."""
    draw = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        for _ in range(seconds // 60):
            minute = (draw.normal(0, 2000, 60 * RATE)).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(minute, format="s16", layout="mono")
            frame.sample_rate = RATE
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def peak_mb(pid: int) -> float | None:
    """The most memory that a process held so far; None once it ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1024 if lines else None


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_three_hours_through_the_command(tmp_path: Path, figures: dict[str, Any]) -> None:
    save_converted(tiny.model(frames=129, height=16, width=16, steps=1), tmp_path / "model", torch.float32)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "face.png")
    write_speech(tmp_path / "speech.flac", HOURS * 3600)
    options = {
        "image": tmp_path / "face.png",
        "audio": tmp_path / "speech.flac",
        "out": tmp_path / "out.mp4",
        "checkpoint": tmp_path / "model",
        "precision": "fp32",
    }
    command = [sys.executable, "-m", "flashtalk_rt", "generate"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, *(str(part) for name, value in options.items() for part in (f"--{name}", value))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks: dict[int, float] = {}  # by minutes of wall clock

    def watch() -> None:
        while (peak := peak_mb(process.pid)) is not None:
            peaks[int((time.perf_counter() - begin) / 60)] = peak
            time.sleep(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, error = process.communicate()
    watcher.join()
    assert process.returncode == 0, error
    figures["three_hours_peak_mb_by_minute"] = {minute: round(peak) for minute, peak in peaks.items()}
    figures["three_hours_wall_s"] = round(time.perf_counter() - begin)
    assert playable_s(tmp_path / "out.mp4") == pytest.approx(HOURS * 3600, abs=1 / 25)
    assert peaks[max(peaks)] - peaks[1] < ALLOWED_GROWTH_MB

"""Thirty minutes of audio through one session: the peak stays flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MINUTES = 30
BLOCK_S = 10
ALLOWED_GROWTH_MB = 20.0

# Long chunks at the smallest size: a stream of many minutes in little time.
STREAM = f"""
import json, sys
import numpy as np, torch, tiny
from flashtalk_rt.runtime import Engine

def status_mb(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) / 1024

torch.set_num_threads(1)
model = tiny.model(frames=129)
engine = Engine(model, steps=1, precision="fp32", height=16, width=16)
session = engine.session(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
audio = np.random.default_rng(1)
frames, rows = 0, []
for block in range({MINUTES} * 60 // {BLOCK_S}):
    session.push_audio(audio.normal(0, 0.1, {BLOCK_S} * 16000).astype(np.float32))
    for chunk in session:
        frames += chunk.frames.shape[0]
    if (block + 1) * {BLOCK_S} % 60 == 0:
        minute = (block + 1) * {BLOCK_S} // 60
        rows.append({{"minute": minute, "rss_mb": status_mb("VmRSS"), "peak_mb": status_mb("VmHWM")}})
session.end_audio()
frames += sum(chunk.frames.shape[0] for chunk in session)
json.dump({{"frames": frames, "rows": rows}}, sys.stdout)
"""


def test_thirty_minutes_stream_at_a_flat_peak(figures: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAM],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    figures["session_rss_and_peak_mb_by_minute"] = {
        row["minute"]: [round(row["rss_mb"]), round(row["peak_mb"])] for row in result["rows"]
    }
    assert result["frames"] == MINUTES * 60 * 25
    warm = next(row for row in result["rows"] if row["minute"] == 2)
    last = result["rows"][-1]
    assert last["minute"] == MINUTES
    assert last["peak_mb"] - warm["peak_mb"] < ALLOWED_GROWTH_MB

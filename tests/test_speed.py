"""The embedded model on two CPU cores, through the real command: seconds of compute a second of video."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ASSETS = Path(__file__).parents[1] / "flashtalk_rt" / "assets"


@pytest.mark.alone
@pytest.mark.parametrize(("steps", "limit_s"), [(8, 3.0), (24, 6.0)])
def test_generate_keeps_its_budget(
    steps: int, limit_s: float, tmp_path: Path, figures: dict[str, Any]
) -> None:
    """8 steps, the default, are the few-step setting and 24 the quality setting."""
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "flashtalk_rt", "generate"),
            *("--image", str(ASSETS / "portrait.png"), "--audio", str(ASSETS / "speech.flac")),
            *("--out", str(tmp_path / "out.mp4"), "--steps", str(steps), "--device", "cpu"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = re.search(r"([\d.]+) s of compute per second of video", ran.stdout + ran.stderr)
    assert said is not None, ran.stdout + ran.stderr
    print(f"{steps} steps: {said[1]} s of compute per second of video")
    figures[f"generate_{steps}_steps_s_per_video_s"] = float(said[1])
    assert float(said[1]) <= limit_s

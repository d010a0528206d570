"""Result files of measured runs: what they were measured on, and what a latency result must hold."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, OutputError

FIGURES = (
    "dit_step_ms",
    "vae_decode_ms",
    "vae_encode_ms",
    "color_ms",
    "chunk_ms",
    "first_frame_ms",
    "peak_memory_gb",
)
_FIELDS: dict[str, type] = {
    "device": str,
    "gpus": int,
    "commit": str,
    "torch": str,
    "precision": str,
    "height": int,
    "width": int,
    "steps": int,
}
_GIT_TIMEOUT_S = 20


def environment(device: torch.device, gpus: int = 1) -> dict[str, Any]:
    """What a run is measured on: device (its name), gpus (how many take part; 0 on a CPU), commit, torch, and
    the versions of CUDA, cuDNN and Triton where present."""
    cuda = device.type == "cuda"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "gpus": gpus if cuda else 0,
        "commit": commit_of(Path(__file__)),
        "torch": torch.__version__,
    }
    if torch.version.cuda is not None:
        result["cuda"] = torch.version.cuda
    if torch.backends.cudnn.is_available():
        result["cudnn"] = torch.backends.cudnn.version()
    with contextlib.suppress(metadata.PackageNotFoundError):
        result["triton"] = metadata.version("triton")
    return result


def commit_of(file: Path) -> str:
    """The short hash of the checkout that tracks `file`, with "-dirty" when a tracked file differs from it.

    A file COMMIT in the folder above `file`'s says it instead, for a copy whose git, if any, is not its own.
    "unknown" without either.
    """
    said = file.parent.parent / "COMMIT"
    if said.is_file():
        return said.read_text(encoding="utf-8").strip()
    try:
        # A copy installed below some other checkout is not that checkout's.
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        commit = _git(file.parent, "rev-parse", "--short", "HEAD")
        dirty = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("-dirty" if dirty else "")


def result_name(record: Mapping[str, Any]) -> str:
    """The file name of a latency result: one a device, size, number of steps and precision."""
    size = f"{record['height']}x{record['width']}"
    return f"latency-{slug(record['device'])}-{size}-{record['steps']}-{record['precision']}.json"


def slug(device: str) -> str:
    """A device's name as part of a file name: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_result(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` to `path` as one JSON object.  Raises OutputError where that fails, ValueError for
    NaN or infinity."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"result {path} cannot be written: {error.strerror or error}") from error


def read_latency(path: Path) -> dict[str, Any]:
    """A result file of the latency suite, checked by `check_latency`.  Raises InputError naming what is
    wrong with it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"result {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"result {path} is not JSON: {error}") from error
    check_latency(record, str(path))
    return record  # type: ignore[no-any-return]


def check_latency(record: Any, where: str) -> None:
    """Raise InputError unless `record` is a latency result: an object with device, gpus, commit, torch,
    precision, height, width and steps, and with the objects figures, floors, reference and spreads, each
    with every name of FIGURES; a figure is a positive number, and only in the last three may it be null
    (not measured).  `where` begins the error's text."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object but {type(record).__name__}")
    for name, kind in _FIELDS.items():
        if not isinstance(record.get(name), kind) or isinstance(record.get(name), bool):
            raise InputError(f"{where}: {name} is {record.get(name)!r}; it must be {kind.__name__}")
    for table in ("figures", "floors", "reference", "spreads"):
        values = record.get(table)
        if not isinstance(values, dict):
            raise InputError(
                f"{where}: {table} is {values!r}; it must be an object keyed {', '.join(FIGURES)}"
            )
        for name in FIGURES:
            if name not in values:
                raise InputError(f"{where}: {table} has no {name}")
            if not _is_measured(values[name], table):
                raise InputError(f"{where}: {table}.{name} is {values[name]!r}; it must be a positive number")


def _is_measured(value: Any, table: str) -> bool:
    if value is None:
        return table != "figures"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value > 0 or (value == 0 and table == "spreads")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S
    )
    return done.stdout.strip()


def _cpu_name() -> str:
    """Of the processor as Linux tells it, else "CPU"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"

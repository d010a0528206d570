"""What this machine has, and which backend serves each op on it and why the others were refused."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import av
import torch
from rich.console import Group, RenderableType
from rich.table import Table

from .config import DiTConfig
from .errors import InputError
from .ops._dispatch import OpSpec, Situation, choose
from .ops.slice_conv import extension

# What decides the speed of fp32 and bf16 matrix products; Linux's names for x86 and Arm.
CPU_FEATURES = {
    "x86_64": ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"),
    "aarch64": ("asimd", "bf16", "sve", "svebf16"),
}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),  # the VAE's is float16 there
}
BY_SIZE = "for heads of 128; slice_conv, pixel_attention and dual_cross_attention also choose by size"
COMMAND_TIMEOUT_S = 20


def report(ops: Iterable[OpSpec], cpuinfo: Path = Path("/proc/cpuinfo")) -> RenderableType:
    """Two tables: the machine, and the backend of each op on every device and dtype present."""
    machine = Table("", "this machine", title="Machine")
    for name, value in [*software(), *cpu(cpuinfo), *gpus()]:
        machine.add_row(name, value)
    served = Table(
        "op", "device", "dtype", "served by", "refused, and why", title="Operators", caption=BY_SIZE
    )
    for row in served_by(ops, devices(), DiTConfig().head_dim):
        served.add_row(*row)
    return Group(machine, served)


def devices() -> list[torch.device]:
    """The CPU and every CUDA device that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def served_by(
    ops: Iterable[OpSpec], on: Sequence[torch.device], head_dim: int
) -> list[tuple[str, str, str, str, str]]:
    """Rows (op, device, dtype, backend, reasons of the refused) for every op, device and dtype."""
    rows = []
    for op in ops:
        for device in on:
            for dtype in DTYPES[device.type]:
                where = (op.name, str(device), str(dtype).removeprefix("torch."))
                try:
                    choice = choose(op, Situation.of(device, dtype, head_dim))
                except InputError as error:
                    rows.append((*where, "nothing", str(error)))
                    continue
                reasons = "\n".join(f"{name}: {reason}" for name, reason in choice.refused.items())
                rows.append((*where, choice.backend, reasons or "-"))
    return rows


def software() -> list[tuple[str, str]]:
    """Versions of what the package runs on; what is absent says so, and how to get it."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return [
        ("flashtalk_rt", version("flashtalk_rt", "not installed (pip install -e .)")),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__} ({built_for()})"),
        ("cuDNN", "none in this torch" if cudnn is None else str(cudnn)),
        ("triton", version("triton", "not installed (extra: cuda)")),
        ("flash-attn", version("flash-attn", "not installed (extra: fa2; never required)")),
        ("flash-attn-4", version("flash-attn-4", "not installed (extra: fa4; never required)")),
        ("nvcc", nvcc()),
        ("CUDA extension", cuda_extension()),
        ("PyAV", f"{av.__version__}; {encoders()}"),
    ]


def built_for() -> str:
    """The accelerator that this torch was built for."""
    cuda = torch.version.cuda
    return "CPU build" if cuda is None else f"built for CUDA {cuda}"


def version(distribution: str, absent: str) -> str:
    """The installed version of a distribution, or `absent`."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return absent


def encoders() -> str:
    """Whether PyAV's ffmpeg can write what `generate` writes: H.264 and AAC."""
    found = []
    for label, name in (("H.264", "libx264"), ("AAC", "aac")):
        try:
            av.codec.Codec(name, "w")
        except ValueError:
            found.append(f"{label} encoder {name} MISSING: videos cannot be written (pip install av)")
        else:
            found.append(f"{label} encoder {name}")
    return ", ".join(found)


def nvcc() -> str:
    """The CUDA compiler's version line."""
    path = shutil.which("nvcc")
    if path is None:
        return "not found on PATH (only needed to build csrc)"
    lines = run([path, "--version"])
    return next((line.strip() for line in lines if "release" in line), f"{path} did not answer")


def cuda_extension() -> str:
    """Where the compiled kernels are, or why there are none."""
    found = extension()
    return found if isinstance(found, str) else f"{found.__name__} in {found.__file__}"


def run(command: list[str]) -> list[str]:
    """The output lines of a command; none if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def cpu(cpuinfo: Path) -> list[tuple[str, str]]:
    """Model, cores this process may use, instruction sets and memory; `cpuinfo` as Linux writes it."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    wanted = CPU_FEATURES.get(platform.machine(), ())
    if flags:
        features = ", ".join(f"{name} {'yes' if name in flags else 'no'}" for name in wanted)
    else:
        features = f"unknown ({cpuinfo} lists none)"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        ("CPU", fields.get("model name", platform.machine())),
        ("cores", f"{usable} usable of {os.cpu_count()}; torch uses {torch.get_num_threads()} threads"),
        ("CPU features", features or f"none looked for on {platform.machine()}"),
        ("torch kernels", torch.backends.cpu.get_cpu_capability()),
        ("memory", f"{memory_bytes / 2**30:.1f} GiB"),
    ]


def gpus() -> list[tuple[str, str]]:
    """One row a CUDA device, and the driver; says so when the driver has a GPU that torch cannot use."""
    driver = run(["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"])
    rows = [("NVIDIA driver", driver[0].split(",")[0] if driver else "none")]
    for device in devices()[1:]:
        facts = torch.cuda.get_device_properties(device)
        rows.append(
            (
                str(device),
                f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.1f} GiB",
            )
        )
    if len(rows) == 1:
        hidden = f"; the driver has {len(driver)} that it cannot use: {built_for()}" if driver else ""
        rows.append(("CUDA devices", f"torch sees none{hidden}"))
    return rows

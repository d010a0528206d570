"""What the tests build of csrc: the extension, its machine code, and the models of its kernels for a CPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not on PATH: csrc is not compiled here"
)
needs_cxx = pytest.mark.skipif(
    shutil.which("c++") is None, reason="no C++ compiler: the model of the kernel is not run"
)
# nvcc's, ptxas's and the C++ compiler's own; not Python's deprecations around them.
COMPILER_WARNING = re.compile(
    r"^.*(?:\b(?:nvcc|ptxas|nvlink|cc1plus)\b|\.(?:cu|cuh|cpp|h)\b).*\bwarning\s*[:#].*$", re.MULTILINE
)


def build(folder: Path) -> Path:
    """The extension as setup.py builds it, under `folder`; any warning of nvcc or ptxas, a spill too, is an
    error."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib")]
    done = subprocess.run(
        [*command, "--build-temp", str(folder / "temp")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = list((folder / "lib" / "flashtalk_rt").glob("_C.*"))
    assert done.returncode == 0 and len(found) == 1, done.stdout[-4000:] + done.stderr[-4000:]
    assert COMPILER_WARNING.findall(done.stdout + done.stderr) == []
    return found[0]


def load(path: Path) -> ModuleType:
    """The extension at `path`, loaded."""
    # Not the installed one's name: to an equal name pybind11 gives the module that was loaded first.
    spec = importlib.util.spec_from_file_location("built._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine_code(binary: Path) -> str:
    """The listing of a library's or cubin's machine code by the cuobjdump in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None, "the dev extra installs triton"
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout


def kernel_code(name: str, folder: Path) -> str:
    """The machine code of csrc/kernels/`name`.cu alone, compiled into `folder`.  A warning, or products that
    ptxas serialised, is an error."""
    binary = folder / f"{name}.cubin"
    flags = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Werror=all-warnings"]
    source = CSRC / "kernels" / f"{name}.cu"
    done = subprocess.run(
        ["nvcc", *flags, "-Xptxas=-warn-spills", f"-I{CSRC}", "-cubin", "-o", binary, source],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "serialized" not in done.stdout + done.stderr
    return machine_code(binary)


def check_attention_code(text: str, scores: str, sums: str, keys: int, step: int) -> None:
    """In the machine code of an attention of 128 columns: a tile's scores and the last one's sums are asked
    for, then come the exponentials, then a wait.  scores, sums: patterns of their products, which sum over
    `step` columns or keys; keys: a tile's."""
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.MULTILINE)

    def at(pattern: str) -> list[int]:
        return [i for i, line in enumerate(code) if re.search(pattern, line)]

    assert at(r"\b(LDL|STL)\b") == [], "local memory"
    asked, summed = at(scores), at(sums)
    assert len(asked) == 2 * 128 // step and len(summed) == 2 * keys // step, (
        "of the first or last, of a step"
    )
    assert len(at("GMMA")) == len(asked) + len(summed)
    (both,) = at(r"DEPBAR\.LE gsb0, 0x1")
    end = next(i for i in at(r"DEPBAR\.LE gsb0, 0x0") if i > both)
    assert asked[-1] < summed[0] and summed[keys // step - 1] < both
    weights = [i for i in at(r"MUFU\.EX2") if both < i < end]
    assert len(weights) == keys // 2 + 2, "a thread's weights, and by what two rows fade"
    # What follows the release of registers belongs to the loading warp, which kept 24.
    start = at(r"USETMAXREG\.DEALLOC")[0]
    assert "0x18" in code[start]
    assert max(int(r) for line in code[start:] for r in re.findall(r"\bR(\d+)\b", line)) < 24


def skip_without_kernel(found: ModuleType | str) -> None:
    """Skip on a GPU that is not sm_90's, and where the extension is not there for want of a compiler: with
    one it should have been built."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is sm_90's")
    if isinstance(found, str):
        (pytest.fail if shutil.which("nvcc") else pytest.skip)(found)


def run_model(name: str, folder: Path) -> str:
    """Compile csrc/tests/`name`.cpp into `folder` and run it: its output.  A warning is an error."""
    program = folder / name
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    subprocess.run(["c++", *flags, CSRC / "tests" / f"{name}.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout

"""The wheel and the editable install hold the mapped folders; the bare names stay free."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashtalk_rt

ROOT = Path(__file__).parents[1]
INFO = f"flashtalk_rt-{flashtalk_rt.__version__}.dist-info"
SHIPPED = ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "flashtalk_rt",
           "graphs", "profiles", "triton_kernels")  # fmt: skip


def run(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in `folder`, which it can import from and which comes first.

    It finds no nvcc, so that the extension is not compiled here: tests/test_csrc.py does that.
    """
    dropped = ("PYTHONPATH", "PYTHONSAFEPATH", "CUDA_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | variables
    folders = environment["PATH"].split(os.pathsep)
    environment["PATH"] = os.pathsep.join(f for f in folders if not Path(f, "nvcc").exists())
    return subprocess.run(
        [sys.executable, *arguments],
        check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that no stale build/ folder takes part and none is left."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
        else:
            shutil.copy(source, copy / name)
    (copy / "profiles" / "results").mkdir(exist_ok=True)
    (copy / "profiles" / "results" / "run.json").write_text("{}")
    return copy


def unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds, unpacked."""
    out = tmp_path_factory.mktemp("wheel")
    pip = ["-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    done = run(pip, checkout)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob(f"flashtalk_rt-{flashtalk_rt.__version__}-*.whl")
    return unpack(wheel, out / "site")


def test_the_wheel_holds_the_package_and_nothing_else(installed: Path) -> None:
    assert sorted(p.name for p in installed.iterdir()) == ["flashtalk_rt", INFO]
    package = installed / "flashtalk_rt"
    files = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    assert {"py.typed", "config.py", "profiles/__init__.py", "profiles/nvtx.py", "ops/_dispatch.py"} <= files
    sources = {p.relative_to(ROOT / "flashtalk_rt").as_posix() for p in (ROOT / "flashtalk_rt").rglob("*.py")}
    assert sources <= files
    for folder in ("assets", "embedded"):
        shipped = (ROOT / "flashtalk_rt" / folder).glob("*")
        assert {f"{folder}/{p.name}" for p in shipped if p.is_file()} <= files
    assert not [name for name in files if name.startswith("profiles/results")]


def test_the_wheel_states_its_extras_command_and_licence(installed: Path) -> None:
    info = installed / INFO
    metadata = (info / "METADATA").read_text()
    for line in (
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "Requires-Dist: torch<3,>=2.8",
        'Requires-Dist: cuda-python<14,>=13; extra == "cuda"',
        'Requires-Dist: flash-attn; extra == "fa2"',
        'Requires-Dist: flash-attn-4; extra == "fa4"',
        'Requires-Dist: tensorboard; extra == "train"',
        'Requires-Dist: pytest; extra == "dev"',
    ):
        assert line in metadata.splitlines()
    assert "flashtalk = flashtalk_rt.cli:entry" in (info / "entry_points.txt").read_text()
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()


def test_without_nvcc_the_wheel_is_pure_and_the_build_says_so(installed: Path, checkout: Path) -> None:
    assert "Tag: py3-none-any" in (installed / INFO / "WHEEL").read_text().splitlines()
    done = run(["setup.py", "--version"], checkout)
    assert done.returncode == 0
    assert "flashtalk_rt._C is not built: nvcc is neither on PATH nor in $CUDA_HOME/bin" in done.stderr


@pytest.fixture
def cuda_home(tmp_path: Path) -> Path:
    """Holds an nvcc that is found and cannot compile."""
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    return compiler.parents[1]


def test_without_the_build_tools_the_build_says_so(checkout: Path, cuda_home: Path) -> None:
    # As under build isolation.
    isolated = "import runpy, sys; sys.modules['pybind11'] = None; sys.argv = ['setup.py', '--version']; "
    done = run(["-c", isolated + "runpy.run_path('setup.py')"], checkout, CUDA_HOME=str(cuda_home))
    assert done.returncode == 0
    assert "flashtalk_rt._C is not built: nvcc is here, cmake or pybind11 is not" in done.stderr


def test_an_extension_that_does_not_compile_fails_no_install(
    checkout: Path, cuda_home: Path, tmp_path: Path
) -> None:
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    done = run(["-c", build], checkout, CUDA_HOME=str(cuda_home))
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.whl"))) == 1
    assert not list((checkout / "flashtalk_rt").glob("_C*"))
    assert 'building extension "flashtalk_rt._C" failed' in done.stdout + done.stderr


def test_the_wheel_imports_the_mapped_folder(installed: Path) -> None:
    done = run(["-c", "import flashtalk_rt.profiles.nvtx as n; print(n.__file__)"], installed)
    assert done.stdout.strip() == str(installed / "flashtalk_rt" / "profiles" / "nvtx.py"), done.stderr


def test_the_editable_install_imports_the_mapped_folder(checkout: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    done = run(["-c", build], checkout)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = unpack(wheel, tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -S and the order keep out an editable install of this environment: its finder has the same name.
    libraries = [path for path in sys.path if path.endswith("-packages")]
    code = (
        f"import site, sys; site.addsitedir({str(site)!r}); sys.path += {libraries!r}; "
        "import flashtalk_rt.profiles.nvtx as n; print(n.__file__)"
    )
    done = run(["-S", "-c", code], elsewhere)
    assert done.stdout.strip() == str(checkout / "profiles" / "nvtx.py"), done.stderr


def test_the_bare_name_is_refused_with_the_right_one() -> None:
    done = run(["-c", "import profiles"], ROOT)
    assert done.returncode != 0
    assert (
        "ImportError: this folder was imported as 'profiles'; it is the package flashtalk_rt.profiles"
        in done.stderr
    )

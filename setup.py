"""What `pyproject.toml` cannot say: top-level folders that are subpackages, and the optional CUDA extension.

The folders' names are too greedy to claim in site-packages, so `profiles/` is installed as
`flashtalk_rt.profiles`, and so on.

`flashtalk_rt._C` is built by CMake where nvcc, cmake and pybind11 are found.  Anywhere else, and where
compiling fails, the package is installed without it; the build says so, and so does `flashtalk doctor`.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

MAPPED = ["graphs", "profiles", "triton_kernels"]
ROOT = Path(__file__).parent


def find(tool: str, *folders: Path) -> str | None:
    """The path of an executable: in one of the folders, or on PATH."""
    return shutil.which(tool, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return find("nvcc", Path(home) / "bin") if home else find("nvcc")


def beside_python(tool: str) -> str | None:
    """A tool that pip installed into this environment, which need not be on PATH."""
    return find(tool, Path(sys.executable).parent)


def missing() -> str | None:
    """Why the extension cannot be built here, in one line; None if it can."""
    if nvcc() is None:
        return "nvcc is neither on PATH nor in $CUDA_HOME/bin"
    if beside_python("cmake") is None or importlib.util.find_spec("pybind11") is None:
        # So it is under build isolation: requiring them there would slow every install without nvcc.
        return "nvcc is here, cmake or pybind11 is not (pip install --no-build-isolation, with the dev extra)"
    return None


class CMakeBuild(build_ext):
    """Hands the extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake, ninja = str(beside_python("cmake")), beside_python("ninja")
        folder = Path(self.build_temp).resolve() / "csrc"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            cmake, "-S", str(ROOT.resolve()), "-B", str(folder),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DCMAKE_CUDA_COMPILER={nvcc()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *([] if ninja is None else ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]),
        ]  # fmt: skip
        for command in (configure, [cmake, "--build", str(folder)]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                # The extension is optional: setuptools states this and installs without it.
                raise CompileError(f"flashtalk_rt._C is not built: {error}") from error


reason = missing()
if reason is not None:
    print(f"flashtalk_rt._C is not built: {reason}", file=sys.stderr)
sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
extension = Extension("flashtalk_rt._C", [], depends=["CMakeLists.txt", *sources], optional=True)

setup(
    packages=find_packages(include=["flashtalk_rt", "flashtalk_rt.*"])
    + [f"flashtalk_rt.{folder}" for folder in MAPPED],
    package_dir={f"flashtalk_rt.{folder}": folder for folder in MAPPED},
    ext_modules=[] if reason else [extension],
    cmdclass={"build_ext": CMakeBuild},
)

"""Who may import whom (the table of README.md), and the other rules that a reader of the code relies on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "flashtalk_rt"
MAPPED = ("graphs", "profiles", "triton_kernels")  # top-level folders that setup.py maps into the package
MAX_LINES = 400

# Layer -> the layers it may import beside itself and OPEN.
ALLOWED: dict[str, set[str]] = {
    "triton_kernels": set(),
    "graphs": set(),
    "profiles": set(),
    "parallel": set(),
    "ops": {"triton_kernels", "_C"},
    "modules": {"ops", "parallel"},
    "runtime": {"modules", "graphs", "parallel"},
    "training": {"modules", "ops", "parallel"},
    "media": {"modules"},
}
OPEN = {"config", "errors", "files", "profiles.nvtx", "profiles.record"}  # to every layer
LEAVES = {
    "errors": set(),
    "config": {"errors"},
    "files": {"errors"},
    "profiles.nvtx": {"config"},
    "profiles.record": {"errors"},
}  # what the open ones may import
TOP = {
    "",
    "__main__",
    "bench",
    "cli",
    "demo",
    "doctor",
    "options",
    "profile",
}  # may import everything; "" is flashtalk_rt/__init__.py


def imports(module: str, is_package: bool, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported; `from a import b` gives a.b."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = base + ([node.module] if node.module else [])
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value[0] != ".":
                yield node.lineno, name.value
            else:
                yield node.lineno, f"{PACKAGE}.<a name made at run time>"


def called(node: ast.Call) -> str:
    """The last name of what is called: `f` for both f() and a.f()."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def may_import(module: str, target: str) -> bool:
    """Both dotted names below the package: "runtime.session" may import "modules.dit.DiT"?"""
    layer, target_layer = module.split(".")[0], target.split(".")[0]
    if layer in TOP:
        return True
    for leaf, allowed in LEAVES.items():
        if within(module, leaf):
            return any(within(target, name) for name in allowed)
    return (
        any(within(target, name) for name in OPEN)
        or target_layer == layer
        or target_layer in ALLOWED.get(layer, set())
    )


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What the file of the dotted `module` does against the rules, a line each."""
    tree = ast.parse(source)
    found = []
    below = module.removeprefix(PACKAGE).removeprefix(".")
    if below.split(".")[0] not in {*ALLOWED, *TOP, *LEAVES}:
        found.append(f"{module}: no known layer; place it in tests/test_layering.py")
    for line, name in imports(module, is_package, tree):
        if name.split(".")[0] in MAPPED:
            found.append(f"{module}:{line}: imports {name} under its bare name")
        elif within(name, PACKAGE) and not may_import(below, name.removeprefix(PACKAGE).removeprefix(".")):
            found.append(f"{module}:{line}: may not import {name}")
        elif name in ("os.environ", "os.getenv", "os.*") and below != "config":
            found.append(f"{module}:{line}: reads the environment outside config.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{module}:{node.lineno}: print in library code")
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in {("os", "environ"), ("os", "getenv"), ("os", "environb")}
            and below != "config"
        ):
            found.append(f"{module}:{node.lineno}: reads the environment outside config.py")
    lines = source.count("\n")
    if lines > MAX_LINES:
        found.append(f"{module}: {lines} lines, more than {MAX_LINES}")
    return found


def library_files() -> list[tuple[str, Path]]:
    """(dotted module, file) of every source file of the package, the mapped folders included."""
    files = []
    for folder, module in [(PACKAGE, PACKAGE), *((name, f"{PACKAGE}.{name}") for name in MAPPED)]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files.append((".".join([module, *(part for part in parts if part != "__init__")]), path))
    return files


@pytest.mark.parametrize(
    ("module", "path"), library_files(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_file_keeps_the_rules(module: str, path: Path) -> None:
    assert violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def test_no_test_file_is_too_long() -> None:
    lines = {path.name: path.read_text(encoding="utf-8").count("\n") for path in ROOT.glob("tests/**/*.py")}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_the_walk_finds_the_files() -> None:
    modules = {module for module, _ in library_files()}
    assert {PACKAGE, f"{PACKAGE}.config", f"{PACKAGE}.ops._dispatch", f"{PACKAGE}.profiles.nvtx"} <= modules


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("modules.dit", "from ..runtime import session"),
        ("modules.dit", "from .. import runtime"),
        ("modules.dit", "import flashtalk_rt.training.dmd"),
        ("modules.dit", "import flashtalk_rt"),
        ("modules.dit", "def f():\n    from ..graphs import capture"),
        ("modules.dit", "import importlib\nimportlib.import_module('flashtalk_rt.runtime')"),
        ("modules.dit", "import importlib\nimportlib.import_module(name)"),
        ("modules.dit", "import importlib\nimportlib.import_module('..runtime', __package__)"),
        ("runtime.session", "from ..training.dmd import step"),
        ("runtime.session", "from ..ops import chunk_attention"),
        ("runtime.session", "from .. import media"),
        ("training.world.renderer", "from ...runtime import session"),
        ("training.stage1", "from ..graphs.capture import Graph"),
        ("ops.norm", "from ..modules import dit"),
        ("parallel.ulysses", "from .. import ops"),
        ("graphs.capture", "from ..modules import vae"),
        ("graphs.capture", "from ..profiles import budgets"),
        ("profiles.timing", "from ..runtime import engine"),
        ("triton_kernels.norm", "from flashtalk_rt import ops"),
        ("media", "from .runtime.session import Session"),
        ("media", "from . import cli"),
        ("errors", "from .config import DiTConfig"),
        ("config", "from .modules import dit"),
        ("profiles.nvtx", "from ..errors import InputError"),
        ("modules.dit", "import profiles"),
        ("cli", "from triton_kernels import norm"),
        ("cli", "import os\nos.environ['A'] = '1'"),
        ("cli", "import os\nos.getenv('A')"),
        ("cli", "from os import environ"),
        ("cli", "print('hello')"),
        ("cli", "x = 1\n" * (MAX_LINES + 1)),
        ("utilities", "x = 1"),
    ],
)
def test_each_rule_can_fail(module: str, source: str) -> None:
    assert len(violations(f"{PACKAGE}.{module}", source)) >= 1


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        (
            "ops.norm",
            "from ..triton_kernels import norm\nfrom .. import _C\nfrom .reference import attend",
            False,
        ),
        ("ops", "from .chunk_attention import chunk_attention", True),
        ("modules.dit", "from .. import ops\nfrom ..parallel.state import ParallelState", False),
        (
            "runtime.session",
            "from ..profiles import nvtx\nfrom ..profiles.nvtx import range\nimport torch",
            False,
        ),
        ("runtime.engine", "from ..graphs.capture import Graph\nfrom ..modules import vae", False),
        ("training.stage1", "from .. import errors, config, ops\nfrom .world import renderer", False),
        ("media", "from .errors import InputError\nfrom .modules.model import Model", False),
        ("cli", "from . import media, runtime, training\nfrom .doctor import report", False),
        ("", "from .runtime.engine import Engine\nfrom . import ops", True),
        ("config", "import os\nfrom .errors import CheckpointError\nos.environ.get('A')", False),
        ("profiles.nvtx", "import nvtx\nfrom ..config import nvtx_enabled", False),
        ("cli", "x = 1\n" * MAX_LINES, False),
    ],
)
def test_what_is_allowed_passes(module: str, source: str, is_package: bool) -> None:
    assert violations(f"{PACKAGE}.{module}".rstrip("."), source, is_package) == []

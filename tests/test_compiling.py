"""Triton's kernels compiled side by side before they are launched, and how every kernel is launched."""

from __future__ import annotations

import ast
import contextlib
import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streams import CHUNK, gpu_model, portrait, push, speech
from triton.runtime import _async_compile
from triton.runtime._async_compile import active_mode

from flashtalk_rt import ops, triton_kernels
from flashtalk_rt.graphs.compiling import compile_ahead
from flashtalk_rt.runtime import Engine, engine, stages
from flashtalk_rt.triton_kernels.launching import launch


class Kernel:
    """What `launch` needs of a kernel; keeps what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.asked.append(("launch", grid, arguments, options))

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.asked.append(("compile", grid, arguments, options))


CUDA = torch.device("cuda")


def test_inside_compile_ahead_a_kernel_is_not_launched() -> None:
    kernel: Any = Kernel()
    launch(kernel, (2, 3), "x", BLOCK=4)
    compile_ahead(lambda: launch(kernel, (2, 3), "x", BLOCK=4), CUDA)
    launch(kernel, (5,), "y")
    work = (2, 3), ("x",), {"BLOCK": 4}
    assert kernel.asked == [("launch", *work), ("compile", *work), ("launch", (5,), ("y",), {})]


class Compiled:
    """What the compiler returns: `run` makes it ready."""

    ready = False

    @property
    def run(self) -> object:
        self.ready = True
        return self


@pytest.fixture
def compilation(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Compiled]], None]:
    """Asks for what a launch asks for inside `compile_ahead`: the call of a compiler, on one thread; as if
    there were a CUDA device.  Its first argument is called when the kernel was compiled."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    init = ThreadPoolExecutor.__init__
    monkeypatch.setattr(ThreadPoolExecutor, "__init__", lambda self: init(self, 1))

    def ask(
        compile_kernel: Callable[[], Compiled], finish: Callable[[Compiled], None] = lambda _: None
    ) -> None:
        mode = active_mode.get()
        assert mode is not None
        mode.submit(object(), compile_kernel, finish)

    return ask


def test_kernels_are_ready_when_compile_ahead_returns(compilation: Any) -> None:
    finished: list[Compiled] = []

    def fail() -> Compiled:
        raise ValueError("no such layout")

    def work() -> None:
        compilation(fail, finished.append)  # left out
        compilation(Compiled, finished.append)

    compile_ahead(work, CUDA)
    assert [kernel.ready for kernel in finished] == [True]


@pytest.mark.parametrize("where", ["in the work", "in the wait"])
def test_an_interrupt_begins_no_further_kernel(
    where: str, compilation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    busy, interrupted = threading.Event(), threading.Event()

    def compile_kernel() -> Compiled:
        begun.append(1)
        busy.set()
        assert interrupted.wait(10)
        return Compiled()

    def interrupt(*_: object) -> None:
        assert busy.wait(10)
        threading.Timer(0.2, interrupted.set).start()  # when the interrupt has come through
        raise KeyboardInterrupt

    def work() -> None:
        for _ in range(5):
            compilation(compile_kernel)
        if where == "in the work":
            interrupt()

    if where == "in the wait":
        monkeypatch.setattr(_async_compile, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compile_ahead(work, CUDA)
    assert len(begun) == 1
    kernel: Any = Kernel()
    launch(kernel, (1,))
    assert [name for name, *_ in kernel.asked] == ["launch"]


def test_without_triton_or_cuda_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ahead(lambda: pytest.fail("run"), torch.device("cpu"))
    older = SimpleNamespace(AsyncCompileMode=lambda executor: None)  # Triton 3.5's takes no ignore_errors
    for installed in (None, older):
        monkeypatch.setitem(sys.modules, "triton", installed)
        compile_ahead(lambda: pytest.fail("run"), CUDA)


def test_every_launcher_calls_launch() -> None:
    """A kernel launched as `kernel[grid](...)` would run inside `compile_ahead`, on what is not there."""
    for path in Path(triton_kernels.__path__[0]).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        found = [call.lineno for call in calls if isinstance(call.func, ast.Subscript)]
        assert len(found) == (path.name == "launching.py"), f"{path.name}: lines {found}"


# --- on a GPU ----------------------------------------------------------------------------------------


def all_kernels() -> list[Any]:
    """Every kernel of ours."""
    names = [module.name for module in pkgutil.iter_modules(triton_kernels.__path__)]
    modules = [importlib.import_module(f"flashtalk_rt.triton_kernels.{name}") for name in names]
    return list({s.kernel: None for module in modules for s in getattr(module, "KERNELS", ())})


def compiled() -> int:
    """Compiled forms of our kernels that this process holds for the first GPU."""
    return sum(len(kernel.device_caches[0][0]) for kernel in all_kernels())


@pytest.mark.gpu
def test_what_was_compiled_ahead_is_what_is_launched() -> None:
    x = torch.randn(1, 3, 1110, device="cuda")  # a width of no other test
    weight, bias = torch.randn(2, 1110, device="cuda")
    before = compiled()
    compile_ahead(lambda: [ops.layer_norm(x, weight, bias, 1e-6, backend="triton") for _ in range(40)], CUDA)
    assert compiled() == before + 1
    out = ops.layer_norm(x, weight, bias, 1e-6, backend="triton")
    assert compiled() == before + 1
    torch.testing.assert_close(out, ops.layer_norm(x, weight, bias, 1e-6, backend="torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_session_and_its_first_chunk_compile_nothing_one_by_one(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = [], []

    def counted(work: Callable[[], object], device: torch.device) -> None:
        before.append(compiled())
        compile_ahead(work, device)
        after.append(compiled())

    for module in (engine, stages):
        monkeypatch.setattr(module, "compile_ahead", counted)
    for kernel in all_kernels():
        kernel.device_caches.clear()
    with contextlib.closing(Engine(gpu_model(wide=True), 2, precision, height=64, width=64)) as made:
        prepared = compiled()  # the weights' conversion
        push(made.session(portrait(), seed=3), speech(2 * CHUNK))
    assert len(after) == 2 and after[0] < after[1]
    assert [*before, compiled()] == [prepared, *after]

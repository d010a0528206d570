"""Which backend serves an op, and why the others were refused."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ..errors import InputError

OLDEST_TRITON = (3, 6)  # whose AsyncCompileMode leaves out what fails


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a backend may ask about the calls it would serve."""

    device_type: str  # "cpu" or "cuda"
    dtype: torch.dtype
    head_dim: int | None = None  # attention's
    grad: bool = False  # the result must be differentiable
    capability: tuple[int, int] | None = None  # the CUDA device's, (9, 0) for sm_90
    cudnn_version: int | None = None  # as torch reports it, 91002 for 9.10.2; None without cuDNN
    key_mask: bool = False  # attention's keys have a bias, or a length that only the device knows

    @classmethod
    def of(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int | None = None,
        grad: bool = False,
        key_mask: bool = False,
    ) -> Situation:
        """The situation of calls on `device`, as this machine and this torch are."""
        if device.type != "cuda":
            return cls(device.type, dtype, head_dim, grad, key_mask=key_mask)
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        capability = torch.cuda.get_device_capability(device)
        return cls(device.type, dtype, head_dim, grad, capability, version, key_mask)

    def __str__(self) -> str:
        architecture = "" if self.capability is None else " sm_{}{}".format(*self.capability)
        head = "" if self.head_dim is None else f" D={self.head_dim}"
        mask = " masked keys" if self.key_mask else ""
        return f"{self.device_type}{architecture} {str(self.dtype).removeprefix('torch.')}{head}{mask}"


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute an op."""

    name: str
    supports: Callable[[Situation], str | None]  # None: it can serve; else one line that says why not
    # Of a call's arguments, for a backend that does not take every size; likewise.
    misfit: Callable[..., str | None] = lambda *args, **kwargs: None


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op: `make` draws its keyword arguments, floating tensors in the dtype asked for.

    What must be float32 whatever the dtype (tables, gates) the maker leaves in float32.
    """

    name: str
    make: Callable[[torch.device, torch.dtype, torch.Generator], dict[str, Any]]


_NAMED: dict[str, OpSpec] = {}  # every op, for `_constant`


@dataclasses.dataclass(frozen=True, eq=False)
class OpSpec:
    """An op and the backends that can compute it, the most wanted first.

    The parity tests and the benchmark go through the registry of these: `function` is the public op
    (it takes `backend=`), `reference` its plain float32 meaning, `eager` the same in the inputs' own
    precision, whose error a backend may double; `cases` are small, odd and ragged, `workload` is the
    14B model's call at 768 x 448, `flop` how many operations a call's arguments ask for (None: it only
    moves data); `gradients` names the arguments it is differentiable in; `eight_bit`: it multiplies in eight
    bits what it is given wider.
    """

    name: str
    backends: tuple[Backend, ...]
    function: Callable[..., Any] | None = None
    reference: Callable[..., Any] | None = None
    eager: Callable[..., Any] | None = None
    cases: tuple[Case, ...] = ()
    workload: Case | None = None
    flop: Callable[..., int] | None = None
    gradients: tuple[str, ...] = ()
    eight_bit: bool = False

    def __post_init__(self) -> None:
        names = [backend.name for backend in self.backends]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"op {self.name}: backends {names} must be distinct, and at least one")
        _NAMED[self.name] = self

    @property
    def plain(self) -> str:
        """The backend that always can: "torch", or else the least wanted."""
        names = [backend.name for backend in self.backends]
        return "torch" if "torch" in names else names[-1]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that serves, and why each one wanted more was refused."""

    backend: str
    refused: Mapping[str, str]  # backend name -> reason


TORCH = Backend("torch", lambda situation: None)
"""Plain torch, which always can."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_version() -> str:
    """Of the Triton that is installed; torch.compile cannot trace its import."""
    import triton

    return str(triton.__version__)


def _triton(situation: Situation) -> str | None:
    if situation.device_type != "cuda":
        return f"needs a CUDA device, this is {situation.device_type}"
    if situation.capability is None or situation.capability < (8, 0):
        return f"needs sm_80 or newer, this is {situation.capability}"
    if situation.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, this is {situation.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (extra: cuda)"
    version = _triton_version()
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        return f"needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, this is {version}"
    return None


TRITON = Backend("triton", _triton)
"""Kernels of `triton_kernels`."""


def choose(op: OpSpec, situation: Situation) -> Choice:
    """The first backend of `op` that supports `situation`; InputError with every reason if none does."""
    refused: dict[str, str] = {}
    for backend in op.backends:
        reason = backend.supports(situation)
        if reason is None:
            return Choice(backend.name, refused)
        refused[backend.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise InputError(f"{op.name}: no backend serves {situation} ({reasons})")


_plainly: ContextVar[bool] = ContextVar("plainly", default=False)


@contextmanager
def plain_backends() -> Iterator[None]:
    """Inside, plain torch serves every op that nobody chose a backend for: what kernels are compared with."""
    token = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(token)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def plainly() -> bool:
    """Whether `plain_backends` is in force; for a caller that has another algebra to choose."""
    return _plainly.get()


def backend_for(
    op: OpSpec,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None = None,
    grad: bool = False,
    wanted: str | None = None,
    key_mask: bool = False,
) -> str:
    """The name of the backend that serves calls in this situation; asked once, a constant to torch.compile.

    `wanted`: the caller's own choice, obeyed or refused with InputError, never replaced.
    """
    asked = (device, dtype, head_dim, grad, wanted, key_mask)
    if torch.compiler.is_compiling():
        constant: str = _constant(op.name, *asked)
        return constant
    return _backend_for(op, *asked, plain=_plainly.get())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant(name: str, *asked: Any) -> str:
    """As `backend_for`, the op by its name: torch 2.11 takes no instance as an argument of a constant."""
    return _backend_for(_NAMED[name], *asked, plain=_plainly.get())


@functools.lru_cache(maxsize=1024)
def _backend_for(
    op: OpSpec,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    grad: bool,
    wanted: str | None,
    key_mask: bool,
    plain: bool,
) -> str:
    if wanted is None and plain:
        return op.plain
    situation = Situation.of(device, dtype, head_dim, grad, key_mask)
    if wanted is None:
        return choose(op, situation).backend
    for backend in op.backends:
        if backend.name == wanted:
            reason = backend.supports(situation)
            if reason is not None and not (wanted == "triton" and interpreted(situation)):
                raise InputError(f"{op.name}: backend {wanted} cannot serve {situation}: {reason}")
            return wanted
    raise InputError(f"{op.name}: no backend {wanted!r}; use one of {[b.name for b in op.backends]}")


def interpreted(situation: Situation) -> bool:
    """Whether Triton's kernels run on the CPU, in its interpreter (tests, TRITON_INTERPRET=1)."""
    if situation.device_type != "cpu" or importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)

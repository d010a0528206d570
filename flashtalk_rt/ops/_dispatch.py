"""Which backend serves an op, and why the others were refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch

from ..errors import InputError


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a backend may ask about the calls it would serve."""

    device_type: str  # "cpu" or "cuda"
    dtype: torch.dtype
    head_dim: int | None = None  # attention's
    grad: bool = False  # the result must be differentiable
    capability: tuple[int, int] | None = None  # the CUDA device's, (9, 0) for sm_90
    cudnn_version: int | None = None  # as torch reports it, 91002 for 9.10.2; None without cuDNN

    @classmethod
    def of(
        cls, device: torch.device, dtype: torch.dtype, head_dim: int | None = None, grad: bool = False
    ) -> Situation:
        """The situation of calls on `device`, as this machine and this torch are."""
        if device.type != "cuda":
            return cls(device.type, dtype, head_dim, grad)
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        capability = torch.cuda.get_device_capability(device)
        return cls(device.type, dtype, head_dim, grad, capability, version)

    def __str__(self) -> str:
        architecture = "" if self.capability is None else " sm_{}{}".format(*self.capability)
        head = "" if self.head_dim is None else f" D={self.head_dim}"
        return f"{self.device_type}{architecture} {str(self.dtype).removeprefix('torch.')}{head}"


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute an op."""

    name: str
    supports: Callable[[Situation], str | None]  # None: it can serve; else one line that says why not


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """An op and the backends that can compute it, the most wanted first."""

    name: str
    backends: tuple[Backend, ...]

    def __post_init__(self) -> None:
        names = [backend.name for backend in self.backends]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"op {self.name}: backends {names} must be distinct, and at least one")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that serves, and why each one wanted more was refused."""

    backend: str
    refused: Mapping[str, str]  # backend name -> reason


TORCH = Backend("torch", lambda situation: None)
"""Plain torch, which always can."""


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


@functools.lru_cache(maxsize=256)
def backend_for(
    op: OpSpec, device: torch.device, dtype: torch.dtype, head_dim: int | None = None, grad: bool = False
) -> str:
    """The name of the backend that serves calls in this situation; asked once."""
    return choose(op, Situation.of(device, dtype, head_dim, grad)).backend

"""Named ranges on a profiler's timeline, around what the host launches.

`with nvtx.range("chunk/dit"): ...` or `@nvtx.range("chunk/dit")`.  They cost a call to an empty method
unless FLASHTALK_NVTX=1 was set when the process started.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar, cast

from ..config import nvtx_enabled

F = TypeVar("F", bound=Callable[..., object])


class Range(Protocol):
    """A context manager that is a decorator too."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...

    def __call__(self, function: F) -> F: ...


class _Off:
    """Does nothing; as a decorator it hands the function back unwrapped."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, function: F) -> F:
        return function


def make_range(enabled: bool) -> Callable[[str], Range]:
    """The function that `range` is: NVTX annotations when `enabled`, else one shared empty range."""
    if not enabled:
        off = _Off()
        return lambda name: off
    import nvtx

    return lambda name: cast(Range, nvtx.annotate(name, domain="flashtalk"))


range = make_range(nvtx_enabled())

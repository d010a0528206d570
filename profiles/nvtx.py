"""Named ranges on a profiler's timeline, around what the host launches.

`with nvtx.range("chunk/dit"): ...` or `@nvtx.range("dit/ffn")`.  Unless FLASHTALK_NVTX=1 was set when the
process started, the first costs a call to an empty method and the second nothing.  The host launches a
CUDA graph as one: what lies inside has its ranges while it is captured, and with `capture=False`.
"""

from __future__ import annotations

import functools
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


class _On:
    """One NVTX annotation; as a decorator, around every call that torch.compile does not trace, since it
    cannot see through NVTX's functions."""

    def __init__(self, annotation: Range, is_compiling: Callable[[], bool]) -> None:
        self._annotation, self._is_compiling = annotation, is_compiling

    def __enter__(self) -> None:
        self._annotation.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._annotation.__exit__(kind, error, trace)

    def __call__(self, function: F) -> F:
        annotation, is_compiling = self._annotation, self._is_compiling

        @functools.wraps(function)
        def ranged(*given: object, **named: object) -> object:
            if is_compiling():
                return function(*given, **named)
            with annotation:
                return function(*given, **named)

        return cast(F, ranged)


def make_range(enabled: bool) -> Callable[[str], Range]:
    """The function that `range` is: NVTX annotations when `enabled`, else one shared empty range."""
    if not enabled:
        off = _Off()
        return lambda name: off
    import nvtx
    from torch.compiler import is_compiling

    return lambda name: _On(nvtx.annotate(name, domain="flashtalk"), is_compiling)


range = make_range(nvtx_enabled())

"""Profiler ranges: nothing when off, NVTX annotations when on, transparent either way."""

from __future__ import annotations

import nvtx as library
import pytest

from flashtalk_rt import config
from flashtalk_rt.profiles import nvtx


def test_a_range_that_is_off_costs_no_wrapper_and_no_import() -> None:
    def function() -> int:
        return 3

    off = nvtx.make_range(False)
    assert off("a")(function) is function
    with off("a"):
        pass
    assert off("a") is off("b")


@pytest.mark.parametrize("enabled", [False, True])
def test_a_range_lets_results_and_errors_through(enabled: bool) -> None:
    timed = nvtx.make_range(enabled)

    @timed("add")
    def add(a: int, b: int) -> int:
        return a + b

    assert add(1, 2) == 3
    with pytest.raises(KeyError), timed("fails"):
        raise KeyError("x")


def test_a_range_that_is_on_marks_the_timeline(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    class Annotation:
        def __init__(self, name: str, domain: str) -> None:
            self.key = (domain, name)

        def __enter__(self) -> None:
            seen.append(self.key)

        def __exit__(self, *error: object) -> None:
            seen.append(("end", self.key[1]))

    monkeypatch.setattr(library, "annotate", Annotation)
    with nvtx.make_range(True)("chunk/dit"):
        pass
    assert seen == [("flashtalk", "chunk/dit"), ("end", "chunk/dit")]


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHTALK_NVTX", raising=False)
    assert not config.nvtx_enabled()
    monkeypatch.setenv("FLASHTALK_NVTX", "1")
    assert config.nvtx_enabled()

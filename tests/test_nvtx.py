"""Profiler ranges: nothing when off, NVTX annotations when on, transparent either way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

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


# The variable is read when the process starts, so a stream's ranges are seen in a process of their own.
STREAM = """
import json, sys, nvtx, torch

events = []

class Annotation:
    def __init__(self, name, domain):
        self.name = name

    def __enter__(self):
        events.append(["push", self.name])

    def __exit__(self, *error):
        events.append(["pop", self.name])

nvtx.annotate = Annotation
import tiny
from streams import CHUNK, portrait, push, small_engine, speech
from flashtalk_rt.modules import dit_layers, vae, vae_layers

torch.set_num_threads(1)
engine = small_engine(steps=2)
session = engine.session(portrait())
started = len(events)
push(session, speech(CHUNK))
first = len(events)
push(session, speech(CHUNK))
streamed = len(events)
decoder, z = tiny.model().vae.decoder, torch.randn(1, 16, 1, 4, 4)
compiled = torch.compile(decoder, backend="eager", fullgraph=True)(z, vae.CacheCursor(None))
traced = len(events) - streamed
same = torch.equal(compiled, decoder(z, vae.CacheCursor(None)))
classes = [value for module in (dit_layers, vae, vae_layers) for value in vars(module).values()
           if isinstance(value, type) and issubclass(value, torch.nn.Module)]
wrapped = [f"{c.__name__}.{k}" for c in classes for k, f in vars(c).items()
           if hasattr(f, "__wrapped__") and not isinstance(f, staticmethod)]
json.dump({"start": events[:started], "chunk": events[first:streamed], "traced": traced, "same": same,
           "wrapped": sorted(wrapped)}, sys.stdout)
"""


def streamed(variable: str) -> dict[str, Any]:
    """What a process with FLASHTALK_NVTX=`variable` pushed and popped: at a session's start and in its second
    chunk; and which methods are wrapped."""
    done = subprocess.run(
        [sys.executable, "-c", STREAM],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "FLASHTALK_NVTX": variable},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def paths(events: list[list[str]]) -> Counter[str]:
    """How often each range was entered, as the names that enclose it; they must nest."""
    entered: Counter[str] = Counter()
    inside: list[str] = []
    for what, name in events:
        if what == "push":
            inside.append(name)
            entered[" ".join(inside)] += 1
        else:
            assert inside.pop() == name
    assert inside == []
    return entered


def test_a_stream_marks_its_stages_and_its_groups_of_ops() -> None:
    result = streamed("1")
    start = paths(result["start"])
    assert start["encoder/text"] == start["encoder/image"] == 1 and start["vae/head"] > 0
    chunk = paths(result["chunk"])
    layers = 2
    groups = ("self_attention", "cross_attention", "audio_cross_attention", "ffn")
    assert {name: count for name, count in chunk.items() if name.startswith("chunk/dit")} == {
        "chunk/dit": 2,  # steps
        "chunk/dit dit/block": 2 * layers,
        **{f"chunk/dit dit/block dit/{group}": 2 * layers for group in groups},
    }
    assert chunk["chunk/audio encoder/audio"] == 1
    latent_frames = 9
    decode, encode = "chunk/vae_decode", "chunk/vae_encode"
    assert chunk[decode] == chunk[f"{decode} vae/head"] == chunk["chunk/color"] == latent_frames
    assert chunk[f"{decode} vae/upsample"] == 3 * latent_frames and chunk[f"{encode} vae/downsample"] == 3
    for stage in (decode, encode):
        assert chunk[f"{stage} vae/attention"] == chunk[f"{stage} vae/head"] > 0
        assert chunk[f"{stage} vae/residual_block"] > 0
    assert result["traced"] == 0 and result["same"], "torch.compile passes them by, and breaks no graph"
    assert {"SelfAttention.forward", "ResidualBlock.forward", "Decoder._frames"} <= set(result["wrapped"])


def test_off_nothing_is_marked_and_no_method_is_wrapped() -> None:
    result = streamed("0")
    assert result["start"] == result["chunk"] == result["wrapped"] == []

"""GPU tests run where there is a CUDA device, the latency suite where --benchmark asks for it too; elsewhere
the summary says what did not run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtalk_rt.profiles.record import environment, write_result

# Tiny tensors: two threads would spend their time waiting for each other. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Without a GPU, Triton's kernels run in its interpreter. It is read when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

NOT_RUN = pytest.StashKey[list[str]]()
FIGURES = pytest.StashKey[dict[str, Any]]()
BEGIN = pytest.StashKey[float]()
OUTCOMES = ("passed", "failed", "error", "skipped", "deselected")
RESULTS = Path(__file__).parents[1] / "profiles" / "results"


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Where a test puts what it measured, for --record."""
    return request.config.stash.setdefault(FIGURES, {})


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGIN] = time.perf_counter()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands over what its tests measured, as JSON: execnet takes few types."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["figures"] = json.dumps(session.config.stash.get(FIGURES, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """The main process takes it over; a worker that crashed has nothing."""
    figures = node.config.stash.setdefault(FIGURES, {})
    for name, value in json.loads(getattr(node, "workeroutput", {}).get("figures", "{}")).items():
        if isinstance(value, dict):  # to which tests on several workers may have added
            figures.setdefault(name, {}).update(value)
        else:
            figures[name] = value


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the latency suite (tests/benchmarks) too")
    parser.addoption("--record", metavar="NAME", help="write profiles/results/NAME.json")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the latency suite unless --benchmark asks for it, and what needs a GPU where there is none."""
    gpu = torch.cuda.is_available()
    latency = [item for item in items if item.get_closest_marker("latency")]
    needing = [item for item in items if item.get_closest_marker("gpu") and item not in latency]
    asked = config.getoption("--benchmark")
    # What takes long runs when it is named: pytest -m long.
    long = [item for item in items if item.get_closest_marker("long")]
    long = [] if "long" in (config.option.markexpr or "") else long
    dropped = ([] if asked and gpu else latency) + ([] if gpu else needing) + long
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    lines = config.stash.setdefault(NOT_RUN, [])
    why = f"not run: torch {torch.__version__} sees no CUDA device"
    if long:
        lines.append(f"{len(long)} long tests not run: run them with -m long")
    if needing and not gpu:
        lines.append(f"{len(needing)} gpu tests {why}")
    if asked and not gpu:
        lines.append(f"latency suite {why}; skipped {', '.join(item.name for item in latency) or 'nothing'}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    not_run = config.stash.get(NOT_RUN, [])
    for line in not_run:
        terminalreporter.write_line(line)
    name = config.getoption("--record")
    if name is not None and not hasattr(config, "workerinput"):  # a worker of pytest-xdist sums up a part
        counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in OUTCOMES}
        skipped = [f"{x.nodeid}: {x.longrepr[2]}" for x in terminalreporter.stats.get("skipped", [])]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record = {
            **environment(device),
            "command": " ".join(["pytest", *config.invocation_params.args]),
            "wall_s": round(time.perf_counter() - config.stash[BEGIN]),
            **counts,
            "not_run": not_run + skipped,
            "figures": config.stash.get(FIGURES, {}),
        }
        write_result(RESULTS / f"{name}.json", record)
        terminalreporter.write_line(f"recorded in {RESULTS / name}.json")

"""GPU tests run where there is a CUDA device; elsewhere the summary says how many did not."""

from __future__ import annotations

import os

import pytest
import torch

# Tiny tensors: two threads would spend their time waiting for each other. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Without a GPU, Triton's kernels run in its interpreter. It is read when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DESELECTED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[DESELECTED] = len(gpu)
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(DESELECTED, 0)
    if count:
        terminalreporter.write_line(
            f"{count} gpu tests not run: torch {torch.__version__} sees no CUDA device"
        )

"""The latency suite against the device's budgets: `pytest --benchmark tests/benchmarks`.

Every case writes profiles/results/latency-*.json, prints its tables, and fails on a breach.  Only 768 x 448
has a plain path beside it (`reference`): compiling it takes minutes a size.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from flashtalk_rt.bench import Baselines, fp8_quality, measure, published_model, table
from flashtalk_rt.config import FLOAT8, Precision
from flashtalk_rt.profiles.budgets import load_budgets
from flashtalk_rt.profiles.record import check_latency, result_name, slug, write_result

RESULTS = Path(__file__).parents[2] / "profiles" / "results"
CASES = [
    pytest.param(height, width, steps, precision, id=f"{height}x{width}-{steps}-{precision}")
    for height, width, steps in ((768, 448, 4), (768, 448, 2), (768, 448, 1), (720, 416, 4))
    for precision in get_args(Precision)
    if precision != "fp32"  # 19 billion parameters do not fit
    and (precision != "8bit" or (height == 768 and steps != 2))  # a shorter suite
]
PLAIN_SIZE = (768, 448)


@pytest.fixture(scope="session")
def baselines() -> Baselines:
    """Shared, so that a size's floors and plain path are measured once."""
    return Baselines()


@pytest.fixture(autouse=True)
def memory() -> None:
    """Let go of the 38 GB model that the traceback of a failed case holds."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.latency
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("height", "width", "steps", "precision"), CASES)
def test_latency(
    benchmark: BenchmarkFixture,
    baselines: Baselines,
    capsys: pytest.CaptureFixture[str],
    height: int,
    width: int,
    steps: int,
    precision: Precision,
) -> None:
    def repeat(call: Callable[[], object], times: int) -> None:
        benchmark.pedantic(call, rounds=times, iterations=1)

    model = published_model(None, height, width)
    record = measure(
        model,
        steps,
        precision,
        height,
        width,
        baselines,
        plain=(height, width) == PLAIN_SIZE,
        repeat=repeat,
    )
    # A failure below keeps this frame alive; it must not keep the model.
    del model
    gc.collect()
    torch.cuda.empty_cache()
    check_latency(record, "the suite's result")
    path = RESULTS / result_name(record)
    write_result(path, record)
    benchmark.extra_info.update(record["figures"])
    budgets = load_budgets(record["device"])
    with capsys.disabled():
        console = Console(width=160)
        console.print()
        console.print(table(record, budgets))
        console.print(str(path))
    if budgets is not None:
        budgets.check(record)


@pytest.mark.gpu
@pytest.mark.latency
@pytest.mark.timeout(300)
@pytest.mark.parametrize("lossy", FLOAT8)
def test_fp8_quality_of_random_weights(lossy: Precision) -> None:
    """What eight bits cost the 14B sizes; random weights have no outliers to speak of, trained ones may."""
    result = fp8_quality(published_model(), lossy=lossy)
    write_result(RESULTS / f"{lossy}-quality-{slug(result['device'])}.json", result)
    assert result["step_relative_error"] < 0.1
    assert min(result["frames_psnr_db"]) > 30  # 36.6; of two prompts 20

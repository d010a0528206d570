"""The 14B model's captured chunks against its own eager path: `pytest --benchmark tests/benchmarks`."""

from __future__ import annotations

import pytest
import torch

from flashtalk_rt.bench import published_model
from flashtalk_rt.bench.suite import Stream
from flashtalk_rt.config import Precision
from flashtalk_rt.runtime import Engine


@pytest.mark.gpu
@pytest.mark.latency
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("height", "width", "precision"), [(768, 448, "fp8"), (720, 416, "bf16"), (768, 448, "8bit")]
)
def test_captured_equals_eager(height: int, width: int, precision: Precision) -> None:
    """Bit for bit, in a first chunk and one that goes on from it."""
    model = published_model(None, height, width)
    made = []
    for capture in (True, False):
        engine = Engine(model, 2, precision, height, width, capture=capture)
        stream = Stream(engine)
        made.append([stream.next_chunk().frames for _ in range(2)])
        engine.close()
        del stream
    for captured, eager in zip(*made, strict=True):
        assert captured.float().std() > 1, "a picture"
        assert torch.equal(captured, eager)

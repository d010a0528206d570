"""What float8 costs a model: errors against bfloat16 and, by layer, what makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import Precision
from ..modules.dit import Block, DiT
from ..modules.model import Model
from ..profiles.record import environment
from ..runtime import Chunk, Engine
from ..training.world.metrics import psnr
from .models import DiTInputs
from .plain import relative_error
from .suite import Stream

# What is quantised in a block: each of these modules reads one input, which all it multiplies shares.
QUANTISED = ("self_attn", "self_attn.o", "cross_attn", "cross_attn.o", "ffn", "ffn.2")


def noise_chunks(engine: Engine) -> list[Chunk]:
    """Two chunks of a random picture and random sound, the second made from the first."""
    made = Stream(engine)
    return [made.next_chunk() for _ in range(2)]


@torch.no_grad()
def fp8_quality(
    model: Model,
    inputs: DiTInputs | None = None,
    make_chunks: Callable[[Engine], Iterable[Chunk]] = noise_chunks,
    lossy: Precision = "fp8",
) -> dict[str, Any]:
    """Compare a model in bfloat16, which it is converted to first, with itself in `lossy`, fp8 or 8bit, which
    it stays in.

    inputs: of the step, None for random ones; make_chunks: the same chunks of an engine of either precision.
    Returns a result with, beside where it was measured:
    step_relative_error: of one step's velocity at noise level 1/2, |lossy - bf16| / |bf16|;
    block_relative_errors: of the residual stream after each block of that step;
    frames_psnr_db: of each chunk;
    inputs: of that step, for each of QUANTISED, by block: the largest and the median crest factor of its rows
    (largest magnitude / root mean square: high where there are outliers), and the relative rounding error.
    """
    stream, device = model.stream, model.device
    inputs = inputs or DiTInputs.draw(model.dit.config, stream, device)
    frames, steps, streams = {}, {}, {}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in QUANTISED}
    precisions: tuple[Precision, ...] = ("bf16", lossy)
    for precision in precisions:
        engine = Engine(model, precision=precision, capture=False)
        step = inputs.step(model.dit)
        with watched(model.dit, rows if precision == "bf16" else None) as streams[precision]:
            steps[precision] = step().float()
        frames[precision] = [chunk.frames.float() / 127.5 - 1 for chunk in make_chunks(engine)]
        engine.close()
    blocks = zip(streams[lossy], streams["bf16"], strict=True)
    return {
        **environment(device),
        "height": stream.height,
        "width": stream.width,
        "steps": stream.steps,
        "precision": lossy,
        "step_relative_error": relative_error(steps[lossy], steps["bf16"]),
        "block_relative_errors": [relative_error(a, b.float()) for a, b in blocks],
        "frames_psnr_db": [psnr(a, b).item() for a, b in zip(frames[lossy], frames["bf16"], strict=True)],
        "inputs": {
            name: {key: [row[key] for row in layers] for key in layers[0]} for name, layers in rows.items()
        },
    }


@contextmanager
def watched(dit: DiT, rows: Mapping[str, list[dict[str, float]]] | None) -> Iterator[list[Tensor]]:
    """The residual stream after each block of the steps made inside, and into `rows` what QUANTISED reads."""
    streams: list[Tensor] = []
    handles = []

    def keep(_: nn.Module, __: object, result: tuple[Tensor, object]) -> None:
        streams.append(result[0])

    for block in dit.blocks:
        assert isinstance(block, Block)
        handles.append(block.register_forward_hook(keep))
        for name, layers in (rows or {}).items():

            def measure(
                _: nn.Module, given: tuple[Tensor, ...], layers: list[dict[str, float]] = layers
            ) -> None:
                layers.append(outliers(given[0]))

            handles.append(block.get_submodule(name).register_forward_pre_hook(measure))
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def outliers(x: Tensor) -> dict[str, float]:
    """Of rows [..., K]: crest factors, and the relative error of rounding them to float8 by rows."""
    wide = x.float()
    crest = wide.abs().amax(-1) / wide.square().mean(-1).sqrt().clamp(min=1e-30)
    rounded = ops.quantize(x)
    return {
        "crest_largest": crest.max().item(),
        "crest_median": crest.median().item(),
        "rounding_error": relative_error(rounded.data.float() * rounded.scale, wide),
    }

"""The latency suite: what a chunk costs, beside its floor and the plain path, in one run.

chunk_ms is the wall clock of a chunk of a running session.  first_frame_ms is the time from the chunk's
start until the pixels of its first new frame are on the host; a caller of `Session` gets them only with the
whole chunk.  Speech is queued ahead, so on a GPU the audio features are there when a chunk begins, and are
in neither figure.  first_chunk_ms is a new session's start and first chunk, the capture of the graphs and
all first use included (Triton's compilation, cuDNN's plans); a warm ~/.triton cache shortens it, and so
does whatever ran in the process before.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..config import Precision
from ..modules.model import Model
from ..profiles import work
from ..profiles.record import FIGURES, environment
from ..profiles.timing import Timing
from ..runtime import Chunk, Engine
from ..runtime.engine import DTYPES
from .baselines import Baselines
from .plain import check_results

WARM_CHUNKS = 2  # after the first, which captures
OPS_SIZE = (768, 448)  # whose calls `OpSpec.workload` makes

Log = Callable[[str], None]
Repeat = Callable[[Callable[[], object], int], object]  # calls its first argument so many times


def repeat_plainly(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


class Stream:
    """A session that never lacks speech; `next_chunk` makes one chunk and keeps how long it took."""

    def __init__(self, engine: Engine) -> None:
        draw = np.random.default_rng(0)
        size = (engine.height, engine.width)
        picture = draw.integers(0, 256, (max(64, size[0]), max(64, size[1]), 3), dtype=np.uint8)
        self._session = engine.session(picture, "A person is talking.", seed=0)
        self._speech = draw.normal(0, 0.1, engine.model.stream.chunk_samples).astype(np.float32)
        self._steps = engine.steps
        self._session.push_audio(self._speech)
        self.timings_ms: list[dict[str, float]] = []

    def next_chunk(self) -> Chunk:
        """Speech for the chunk after the next is queued first, so that it can be heard ahead."""
        self._session.push_audio(self._speech)
        begin = time.perf_counter()
        chunk = next(iter(self._session))
        wall_ms = (time.perf_counter() - begin) * 1e3
        stages = {f"{name}_ms": ms for name, ms in chunk.timings_ms.items()}
        stages["dit_step_ms"] = stages.pop("dit_ms") / self._steps
        self.timings_ms.append({**stages, "chunk_ms": wall_ms})
        return chunk

    def timings(self) -> dict[str, Timing]:
        """Of every chunk since the last call."""
        names = self.timings_ms[0]
        result = {name: Timing(tuple(chunk[name] for chunk in self.timings_ms)) for name in names}
        self.timings_ms.clear()
        return result


def measure(
    model: Model,
    steps: int,
    precision: Precision,
    height: int,
    width: int,
    baselines: Baselines | None = None,
    plain: bool = True,
    repeat: Repeat = repeat_plainly,
    log: Log = lambda line: None,
) -> dict[str, Any]:
    """Run the whole suite and return its result (`profiles.record.check_latency`), with p95, errors and, at
    the size of their calls, ops beside what that asks for.

    The model is converted to `precision` and its text and image encoders are released.  Pass one
    `baselines` to several runs, so that nothing is measured twice.  plain: with the plain path; else
    `reference` holds nothing but null.  `repeat` makes the chunks that are timed.  Raises FlashTalkError
    where a result is wrong, InputError for a setting that the engine refuses.
    """
    baselines = baselines or Baselines()
    plan = baselines.plan
    device = model.device
    stream = dataclasses.replace(model.stream, height=height, width=width)
    parameters = sum(parameter.numel() for parameter in model.dit.parameters())
    engine = Engine(model, steps, precision, height, width)
    dtype = DTYPES[precision]
    log("starting a session, capturing, and making its first chunk")
    forget_peak_memory(device)
    begin = time.perf_counter()
    chunks = Stream(engine)
    model.release_encoders()
    chunks.next_chunk()
    first_ms = (time.perf_counter() - begin) * 1e3
    first_peak_gb = peak_memory_gb(device)
    log("checking one step and one decode against float32")
    errors = check_results(model, stream, precision)  # after the first chunk, which must find nothing ready
    log("making chunks")
    forget_peak_memory(device)
    repeat_plainly(chunks.next_chunk, WARM_CHUNKS)
    chunks.timings()
    repeat(chunks.next_chunk, plan.chunks)
    timings = chunks.timings()
    peak_gb = max(first_peak_gb, peak_memory_gb(device))
    weights_bytes = sum(p.nbytes for network in model.networks() for p in network.state_dict().values())
    engine.close()
    log("measuring the floors")
    floor = baselines.floors(model, stream, precision)
    reference: dict[str, float | None] = dict.fromkeys(FIGURES)
    reference_spreads = {}
    if plain:
        log("compiling and measuring the plain path")
        stages = baselines.plain(model, stream, dtype)
        # The plain path hands out no frame before it has decoded and matched all.
        reference |= with_totals({name: timing.median_ms for name, timing in stages.items()}, steps, 1.0)
        reference_spreads = {name: timing.spread_ms for name, timing in stages.items()}
    log("measuring what the device does at most")
    rates = baselines.rates(device, dtype)
    rows = {}
    # Beside the figures of another size they would mislead; small cases are of no size.
    if (height, width) == OPS_SIZE or not plan.workloads:
        log("measuring the ops")
        rows["ops"] = baselines.ops(device, dtype)
    later = stream.motion_frames // 4 + (stream.motion_frames % 4 > 0)  # latent frames to the first new frame
    first_share = work.total_flop(
        work.vae_decode_frame(model.vae.config, stream, first=True, folded=True)
        + work.vae_decode_frame(model.vae.config, stream, first=False, folded=True) * later
    ) / work.total_flop(work.vae_decode(model.vae.config, stream, folded=True))
    medians = {name: timing.median_ms for name, timing in timings.items()}
    figures = {**medians, "peak_memory_gb": peak_gb, "first_chunk_ms": first_ms}
    spreads: dict[str, float | None] = {name: timing.spread_ms for name, timing in timings.items()}
    return {
        **environment(device),
        "model": f"random weights, {parameters / 1e9:.1f}B DiT",
        "precision": precision,
        "height": height,
        "width": width,
        "steps": steps,
        "chunks": plan.chunks,
        "figures": figures,
        "spreads": {**spreads, "peak_memory_gb": None, "first_chunk_ms": None},
        "p95": {name: timing.p95_ms for name, timing in timings.items()},
        "floors": {**with_totals(floor, steps, first_share), "peak_memory_gb": weights_bytes / 1e9},
        "reference": reference,
        "reference_spreads": reference_spreads,
        "copy_tb_per_s": rates.copy_bytes_per_s / 1e12,
        "product_tflop_per_s": {
            str(dtype).removeprefix("torch."): rates.flop_per_s / 1e12,
            "float8_e4m3fn": rates.fp8_flop_per_s / 1e12,
        },
        "attention_tflop_per_s": rates.attention_flop_per_s / 1e12,
        "errors": errors,
        **rows,
    }


def with_totals(stages: dict[str, float], steps: int, first_share: float) -> dict[str, float]:
    """The stages and what they come to: chunk_ms, and first_frame_ms, for which the fraction `first_share` of
    the decoding and matching is done."""
    denoised_ms = steps * stages["dit_step_ms"]
    drawn_ms = stages["vae_decode_ms"] + stages["color_ms"]
    return {
        **stages,
        "chunk_ms": denoised_ms + drawn_ms + stages["vae_encode_ms"],
        "first_frame_ms": denoised_ms + first_share * drawn_ms,
    }


def forget_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(device: torch.device) -> float:
    """What torch took from the GPU at most since `forget_peak_memory`, captured graphs included; on a
    CPU, the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

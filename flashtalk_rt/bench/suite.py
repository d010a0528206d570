"""The latency suite: what a chunk costs, beside its floor and the plain path, in one run."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import ops
from ..config import Precision, StreamConfig
from ..graphs.buffers import tensors
from ..modules.model import Model
from ..ops._dispatch import OpSpec
from ..profiles import floors, work
from ..profiles.record import environment
from ..profiles.timing import Timing
from ..profiles.timing import measure as time_calls
from ..runtime import Chunk, Engine
from ..runtime.engine import DTYPES
from .plain import check_results, plain_timings

WARM_CHUNKS = 2  # after the first, which captures

Log = Callable[[str], None]
Repeat = Callable[[Callable[[], object], int], object]  # calls its first argument so many times


def repeat_plainly(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How thoroughly to measure."""

    chunks: int = 10
    repeats: int = 20  # of a floor, an op or a stage of the plain path
    compiler: str = "inductor"  # torch.compile's backend for the plain path
    workloads: bool = True  # time ops on the 14B model's calls; else on a small case
    copy_bytes: int = 1 << 30  # of the copy whose rate is the floor of what only moves data


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
    plan: Plan | None = None,
    repeat: Repeat = repeat_plainly,
    log: Log = lambda line: None,
) -> dict[str, Any]:
    """Run the whole suite and return its result (`profiles.record.check_latency`), with p95, errors and ops
    beside what that asks for.

    The model is converted to `precision`.  `repeat` makes the chunks that are timed.  Raises FlashTalkError
    where a result is wrong, InputError for a setting that the engine refuses.
    """
    plan = plan or Plan()
    device = model.device
    stream = dataclasses.replace(model.stream, height=height, width=width)
    parameters = sum(parameter.numel() for parameter in model.dit.parameters())
    engine = Engine(model, steps, precision, height, width)
    dtype = DTYPES[precision]
    log("checking one step and one decode against float32")
    errors = check_results(model, stream, precision)
    log("capturing, and making chunks")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    chunks = Stream(engine)
    chunks.next_chunk()
    first_ms = chunks.timings()["chunk_ms"].median_ms
    repeat_plainly(chunks.next_chunk, WARM_CHUNKS)
    chunks.timings()
    repeat(chunks.next_chunk, plan.chunks)
    timings = chunks.timings()
    peak_gb = peak_memory_gb(device)
    weights_bytes = sum(p.nbytes for network in model.networks() for p in network.state_dict().values())
    engine.close()
    log("measuring the floors")
    floor, copy_rate = measure_floors(model, stream, dtype, precision, plan)
    log("compiling and measuring the plain path")
    plain = plain_timings(model, stream, dtype, plan.compiler, plan.repeats)
    log("measuring the ops")
    op_rows = measure_ops(device, dtype, copy_rate, plan)
    later = stream.motion_frames // 4 + (stream.motion_frames % 4 > 0)  # latent frames to the first new frame
    first_share = work.total_flop(
        work.vae_decode_frame(model.vae.config, stream, first=True)
        + work.vae_decode_frame(model.vae.config, stream, first=False) * later
    ) / work.total_flop(work.vae_decode(model.vae.config, stream))
    medians = {name: timing.median_ms for name, timing in timings.items()}
    figures = {**medians, "peak_memory_gb": peak_gb, "first_chunk_ms": first_ms}
    spreads: dict[str, float | None] = {name: timing.spread_ms for name, timing in timings.items()}
    # The plain path hands out no frame before it has decoded and matched all.
    reference = with_totals({name: timing.median_ms for name, timing in plain.items()}, steps, 1.0)
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
        "reference": {**reference, "peak_memory_gb": None},
        "reference_spreads": {name: timing.spread_ms for name, timing in plain.items()},
        "copy_tb_per_s": copy_rate / 1e12,
        "errors": errors,
        "ops": op_rows,
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


def peak_memory_gb(device: torch.device) -> float:
    """What torch took from the GPU at most since its statistics were reset, captured graphs included; on a
    CPU, the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure_floors(
    model: Model, stream: StreamConfig, dtype: torch.dtype, precision: Precision, plan: Plan
) -> tuple[dict[str, float], float]:
    """The floors of the stages in milliseconds, and the copy rate in bytes read and written a second."""
    device, config = model.device, model.dit.config
    gemm_dtype = floors.FP8 if str(precision).startswith("fp8") else dtype
    copy_rate = floors.copy_bytes_per_s(device, plan.repeats, plan.copy_bytes)

    def floor_ms(items: list[work.Work], attends: list[floors.Attend]) -> float:
        return floors.floor_ms(items, device, dtype, gemm_dtype, plan.repeats, attends)

    step = work.dit_linears(config, stream) + work.dit_self_attention(config, stream)
    return {
        # The fastest attention there is, be it the op's own backend.
        "dit_step_ms": floor_ms(step, [ops.chunk_attention]),
        "vae_decode_ms": floor_ms(convolutions(work.vae_decode(model.vae.config, stream)), []),
        "vae_encode_ms": floor_ms(convolutions(work.vae_encode(model.vae.config, stream)), []),
        "color_ms": 1e3 * work.color_bytes(stream) / copy_rate,
    }, copy_rate


def convolutions(items: list[work.Work]) -> list[work.Work]:
    return [item for item in items if isinstance(item, work.Convolution)]


@torch.no_grad()
def measure_ops(
    device: torch.device, dtype: torch.dtype, copy_rate: float, plan: Plan
) -> dict[str, dict[str, float]]:
    """Every op of the registry that has cases: ms (median), p95_ms, floor_ms (the bytes of its arguments and
    results at the copy rate), reference_ms (its plain meaning under torch.compile, where it fits)."""
    rows = {}
    for spec in ops.REGISTRY:
        case = spec.workload if plan.workloads else next(iter(spec.cases), None)
        if case is None or spec.function is None:
            continue
        arguments = case.make(device, dtype, torch.Generator(device).manual_seed(0))
        rows[spec.name] = measure_op(spec, arguments, device, copy_rate, plan)
    return rows


def measure_op(
    spec: OpSpec, arguments: dict[str, Any], device: torch.device, copy_rate: float, plan: Plan
) -> dict[str, float]:
    """One op on one call."""
    assert spec.function is not None
    function = spec.function
    moved = tensors([list(arguments.values()), function(**arguments)])
    timing = time_calls(lambda: function(**arguments), device, repeats=plan.repeats)
    row = {
        "ms": timing.median_ms,
        "p95_ms": timing.p95_ms,
        "floor_ms": 1e3 * sum(tensor.nbytes for tensor in moved) / copy_rate,
    }
    plain = spec.eager or spec.reference
    if plain is not None:
        compiled = torch.compile(plain, backend=plan.compiler, dynamic=False)
        try:
            reference = time_calls(lambda: compiled(**arguments), device, repeats=plan.repeats)
        except torch.OutOfMemoryError:
            return row  # an explicit form of attention may not fit beside the model
        row["reference_ms"] = reference.median_ms
    return row

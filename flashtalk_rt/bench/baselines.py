"""What a chunk is held against: the plain path, the floors, and the ops one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .. import ops
from ..config import FLOAT8, DiTConfig, Precision, StreamConfig
from ..errors import FlashTalkError, InputError
from ..graphs.buffers import tensors
from ..modules.model import Model
from ..ops._dispatch import Case, OpSpec
from ..profiles import floors, work
from ..profiles.timing import Timing, measure, rotation
from ..runtime.engine import DTYPES, vae_dtype
from .plain import plain_timings, relative_error

ATTENDS = (ops.chunk_attention,)  # the fastest attention there is may be the op's own backend
SELF_ATTENTION = work.Attention(heads=40, queries=12_096, keys=12_096, head_dim=128)  # the 14B model's
OP_ERROR = 0.05  # twice what float8 rounding of a kernel's and of eager's bfloat16 differ by
T = TypeVar("T")
OpRows = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How thoroughly to measure."""

    chunks: int = 10
    repeats: int = 8  # of a floor, or of a stage or an op of the plain path
    op_repeats: int = 20  # of an op: the fewest whose p95 is not simply the largest
    compiler: str = "inductor"  # torch.compile's backend for the plain path
    workloads: bool = True  # time ops on the 14B model's calls; else on a small case
    copy_bytes: int = floors.COPY_BYTES  # of the copy whose rate is the floor of what only moves data
    product_size: int = floors.PRODUCT_SIZE  # of the product whose rate is the floor of what multiplies
    attention: work.Attention = SELF_ATTENTION  # or of this attention


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device does at most, as measured: the floors of single ops."""

    copy_bytes_per_s: float  # read and written
    flop_per_s: float  # of a large product
    attention_flop_per_s: float  # of the fastest attention
    fp8_flop_per_s: float  # of one of float8 operands


class Baselines:
    """Measures each baseline once for all that it depends on, and keeps it for the results that follow."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan or Plan()
        self._kept: dict[tuple[object, ...], Any] = {}

    def plain(self, model: Model, stream: StreamConfig, dtype: torch.dtype) -> dict[str, Timing]:
        """The stages in plain torch under torch.compile: see `plain_timings`."""
        key = ("plain", model.device, model.dit.config, model.vae.config, stream, dtype)
        plan = self.plan
        return self._once(key, lambda: plain_timings(model, stream, dtype, plan.compiler, plan.repeats))

    def floors(self, model: Model, stream: StreamConfig, precision: Precision) -> dict[str, float]:
        """The floors of the stages in milliseconds: see `measure_floors`."""
        key = ("floors", model.device, model.dit.config, model.vae.config, stream, precision)
        device, repeats = model.device, self.plan.repeats
        copy_rate = self.copy_rate(device)
        fp8_rate = self.product_rate(device, floors.FP8) if precision == "8bit" else math.nan
        return self._once(key, lambda: measure_floors(model, stream, precision, copy_rate, fp8_rate, repeats))

    def ops(self, device: torch.device, dtype: torch.dtype) -> OpRows:
        """Every op on its own: see `measure_ops`."""
        rates = self.rates(device, dtype)
        return self._once(("ops", device, dtype), lambda: measure_ops(device, dtype, rates, self.plan))

    def rates(self, device: torch.device, dtype: torch.dtype) -> Rates:
        """Of copies, of products in `dtype` and in float8, and of attention in `dtype`."""
        plan = self.plan

        def attention() -> float:
            took_ms = floors.attention_ms(plan.attention, device, dtype, plan.repeats, ATTENDS)
            return plan.attention.flop / (took_ms / 1e3)

        return self._once(
            ("rates", device, dtype),
            lambda: Rates(
                self.copy_rate(device),
                self.product_rate(device, dtype),
                attention(),
                self.product_rate(device, floors.FP8),
            ),
        )

    def product_rate(self, device: torch.device, dtype: torch.dtype) -> float:
        """Operations a second of a large product of operands in `dtype`."""
        plan = self.plan
        return self._once(
            ("product", device, dtype),
            lambda: floors.product_flop_per_s(device, dtype, plan.repeats, plan.product_size),
        )

    def copy_rate(self, device: torch.device) -> float:
        """Bytes that a copy reads and writes a second."""
        plan = self.plan
        return self._once(
            ("copy", device), lambda: floors.copy_bytes_per_s(device, plan.repeats, plan.copy_bytes)
        )

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])


def measure_floors(
    model: Model, stream: StreamConfig, precision: Precision, copy_rate: float, fp8_rate: float, repeats: int
) -> dict[str, float]:
    """The floors of the stages in milliseconds, of the work in the form that the runtime does it in.

    A step: its linear layers and self-attentions; where the audio's projections are absorbed, the four
    products of that form in their place, which stay in bfloat16 under fp8, as all of the audio's do.  The
    VAE: its convolutions in the dtype it runs in, upsampling folded.  Colour: its bytes at `copy_rate`.
    Attention in eight bits: its operations at `fp8_rate`, that of a float8 product, which only 8bit needs.
    """
    device, config, dtype = model.device, model.dit.config, DTYPES[precision]

    def floor_ms(
        items: list[work.Work], gemm_dtype: torch.dtype = dtype, attends: tuple[floors.Attend, ...] = ()
    ) -> float:
        return floors.floor_ms(items, device, dtype, gemm_dtype, repeats, attends)

    audio = work.dit_audio_linears(config, stream, audio_form(config, stream, device))
    decode = work.vae_decode(model.vae.config, stream, folded=True)

    def convolutions_ms(items: list[work.Work]) -> float:
        chosen = [item for item in items if isinstance(item, work.Convolution)]
        rounded = vae_dtype(precision, device)
        return floors.floor_ms(
            chosen, device, rounded, rounded, repeats, convolves=(slice_convolve, padded_convolve)
        )

    attention = work.dit_self_attention(config, stream)
    if precision == "8bit":
        attention_ms = 1e3 * work.total_flop(attention) / fp8_rate
    else:
        attention_ms = floor_ms(attention, attends=ATTENDS)
    return {
        "dit_step_ms": floor_ms(
            work.dit_main_linears(config, stream), floors.FP8 if precision in FLOAT8 else dtype
        )
        + floor_ms(audio)
        + attention_ms,
        "vae_decode_ms": convolutions_ms(decode),
        "vae_encode_ms": convolutions_ms(work.vae_encode(model.vae.config, stream)),
        "color_ms": 1e3 * work.color_bytes(stream) / copy_rate,
    }


def audio_form(config: DiTConfig, stream: StreamConfig, device: torch.device) -> work.AudioForm:
    """The form of audio cross-attention that the DiT takes in inference."""
    if device.type != "cuda":
        return "plain"
    return ops.audio_form(
        ops.AudioWork(
            work.tokens(stream), stream.latent_frames, config.context_tokens, config.num_heads, config.dim
        )
    )


def slice_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Our own CUDA convolution, as `floors.convolution_ms` calls it."""
    frames, taps = x[0].permute(1, 2, 3, 0), weight.permute(0, 2, 3, 4, 1)
    return ops.slice_conv(frames, taps, weight.new_zeros(len(weight)), backend="cuda")


def padded_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """torch's convolution of channels padded to what its fast kernels take, as `convolution_ms` calls it.
    InputError where they need no padding."""
    if weight.shape[1] % ops.CHANNEL_MULTIPLE == 0:
        raise InputError(f"{weight.shape[1]} channels need no padding")
    return ops.conv3d(x, weight, None, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))


def check_op(name: str, got: Any, plain: Any) -> None:
    """Raise FlashTalkError where a result, on all its elements, is not the plain form's to `OP_ERROR`."""
    for part, expected in zip(*(floats(result) for result in (got, plain)), strict=True):
        error = relative_error(part, expected)
        if not error <= OP_ERROR:  # so that NaN fails
            raise FlashTalkError(
                f"{name} is {error:.2g} of its size from its plain form's result, {OP_ERROR:.2g} is allowed"
            )


def floats(result: Any) -> list[Tensor]:
    """Every tensor of an op's result as float32, float8 with its scale as one."""
    if isinstance(result, ops.Quantized):
        return [result.dequantize()]
    if isinstance(result, Tensor):
        return [result.float()]
    return [tensor for part in result for tensor in floats(part)]


@torch.no_grad()
def measure_ops(device: torch.device, dtype: torch.dtype, rates: Rates, plan: Plan) -> OpRows:
    """Every op of the registry that has cases, by `measure_op`."""
    rows = {}
    for spec in ops.REGISTRY:
        case = spec.workload if plan.workloads else next(iter(spec.cases), None)
        if case is not None and spec.function is not None:
            rows[spec.name] = measure_op(spec, case, device, dtype, rates, plan)
    return rows


def measure_op(
    spec: OpSpec, case: Case, device: torch.device, dtype: torch.dtype, rates: Rates, plan: Plan
) -> dict[str, float]:
    """One op on one call, its arguments not in the L2 cache: ms (median), p95_ms, bytes (of its arguments and
    results), flop (`OpSpec.flop`; 0: it only moves data), floor_ms, reference_ms (its plain meaning under
    torch.compile, but for an op in eight bits, where it fits).  Raises FlashTalkError where that gives
    something else (`check_op`).

    The floor is the larger of the bytes at the copy's rate and the operations at the bare product's or the
    bare attention's, whichever is faster: a GPU at its power limit may clock lower under the product.  Where
    an argument is float8, or the op multiplies in eight bits, they are at the float8 product's.
    """
    assert spec.function is not None
    function = spec.function
    generator = torch.Generator(device).manual_seed(0)
    arguments = case.make(device, dtype, generator)
    given = tensors(list(arguments.values()))
    moved = sum(tensor.nbytes for tensor in [*given, *tensors([function(**arguments)])])
    flop = 0 if spec.flop is None else spec.flop(**arguments)
    if spec.eight_bit or any(tensor.dtype == floors.FP8 for tensor in given):
        flop_rate = rates.fp8_flop_per_s
    else:
        flop_rate = max(rates.flop_per_s, rates.attention_flop_per_s)
    read = sum(tensor.nbytes for tensor in given)
    inputs = rotation(lambda: (case.make(device, dtype, generator),), read, device)
    # As the product whose rate is the floor; what only moves data does not depend on these clocks.
    settle_ms = floors.SETTLE_MS if flop else 0.0

    def timed(call: Callable[..., Any], repeats: int) -> Timing:
        return measure(lambda given: call(**given), device, inputs, repeats, settle_ms=settle_ms)

    timing = timed(function, plan.op_repeats)
    row = {
        "ms": timing.median_ms,
        "p95_ms": timing.p95_ms,
        "bytes": moved,
        "flop": flop,
        "floor_ms": 1e3 * max(moved / rates.copy_bytes_per_s, flop / flop_rate),
    }
    plain = spec.eager or spec.reference
    if plain is not None:
        # A loop over heads would be compiled head by head.
        compiled = plain if spec.eight_bit else torch.compile(plain, backend=plan.compiler, dynamic=False)
        # An explicit form of attention may not fit beside the model.
        with contextlib.suppress(torch.OutOfMemoryError):
            check_op(spec.name, function(**arguments), compiled(**arguments))
            row["reference_ms"] = timed(compiled, plan.repeats).median_ms
    return row

"""Floors: what products, convolutions and copies take, and the operations and bytes of single ops."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashtalk_rt import bench, ops
from flashtalk_rt.bench import baselines
from flashtalk_rt.config import DiTConfig, StreamConfig
from flashtalk_rt.errors import FlashTalkError
from flashtalk_rt.ops._dispatch import Backend, Case, OpSpec
from flashtalk_rt.profiles import floors, timing, work

CPU = torch.device("cpu")
SPECS = {spec.name: spec for spec in ops.REGISTRY if spec.flop is not None}
MASKED = ("chunk=", "length=", "bias=(", "bias (")
# What torch's counter sees as often as we count it: no mask, and no margin around a picture.
PLAINLY_COUNTED = [
    (name, case)
    for name, spec in SPECS.items()
    for case in spec.cases
    if name != "upsample_conv" and not any(mask in case.name for mask in MASKED)
]
PLAN = bench.Plan(
    repeats=1,
    op_repeats=1,
    compiler="eager",
    copy_bytes=1 << 16,
    product_size=32,
    attention=work.Attention(2, 32, 32, 16),
)


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return case.make(CPU, dtype, torch.Generator().manual_seed(0))


def counted(name: str, case: Case) -> int:
    flop = SPECS[name].flop
    assert flop is not None
    return flop(**inputs_of(case))


@pytest.mark.parametrize(("name", "case"), PLAINLY_COUNTED, ids=lambda x: x if isinstance(x, str) else x.name)
@torch.no_grad()
def test_operations_are_those_that_torch_counts(name: str, case: Case) -> None:
    spec = SPECS[name]
    assert spec.reference is not None
    # The counter knows this form of attention on a CPU, not the fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        spec.reference(**inputs_of(case))
    assert counted(name, case) == counter.get_total_flops() > 0


@pytest.mark.parametrize("case", SPECS["chunk_attention"].cases, ids=lambda case: case.name)
def test_attention_counts_the_keys_that_are_seen(case: Case) -> None:
    """Asked of the op itself: a key that is seen has a gradient of its value."""
    given = inputs_of(case)
    q, k, v = (given[name] for name in "qkv")
    _, queries, heads, dim = q.shape
    seen = 0
    for query in range(queries):
        values = v.clone().requires_grad_()
        out = ops.chunk_attention(q, k, values, **{n: given[n] for n in given if n not in "qkv"})
        (gradient,) = torch.autograd.grad(out[:, query].sum(), values)
        seen += int((gradient.abs().amax((2, 3)) > 0).sum())
    assert counted("chunk_attention", case) == 4 * heads * dim * seen <= 4 * q.numel() * k.shape[1]


def test_hidden_text_keys_count_nothing() -> None:
    dual = SPECS["dual_cross_attention"]
    case = next(case for case in dual.cases if case.name.startswith("1x200x3x128 text 7 image 272"))
    assert counted(dual.name, case) == 4 * 200 * 3 * 128 * (7 + 272)
    both = next(case for case in dual.cases if "bias (2, 33)" in case.name and "2x133x1x16" in case.name)
    assert counted(dual.name, both) == 4 * 2 * 133 * 16 * (33 + 65)


def test_upsampling_counts_the_phases() -> None:
    case = SPECS["upsample_conv"].cases[0]  # 2 x 12 channels of 2 frames of 5 x 7, to 6
    folded = work.Convolution(12, 6, (1, 2, 2), 2, 5, 7)
    assert counted("upsample_conv", case) == 2 * 4 * folded.flop


def test_the_14b_models_calls_are_what_its_stages_count() -> None:
    """One layer's, from shapes alone."""
    dit, stream = DiTConfig(), StreamConfig()

    def workload(name: str) -> int:
        spec = SPECS[name]
        assert spec.workload is not None and spec.flop is not None
        with torch.device("meta"):
            given = spec.workload.make(torch.device("meta"), torch.bfloat16, None)  # type: ignore[arg-type]
        return spec.flop(**given)

    layers = dit.num_layers
    assert workload("chunk_attention") * layers == work.total_flop(work.dit_self_attention(dit, stream))
    absorbed = work.dit_audio_linears(dit, stream, "absorbed")
    products = sum(item.flop for item in absorbed if isinstance(item, work.Gemm) and item.batch == 9)
    assert workload("absorbed_audio_attention") * layers == products
    assert workload("slice_conv") == work.Convolution(96, 96, (3, 3, 3), 4, 768, 448).flop
    assert workload("vae_head") == work.Convolution(96, 3, (3, 3, 3), 4, 768, 448).flop
    assert workload("pixel_attention") == work.Attention(1, 5376, 5376, 384).flop


# --- measured floors ---------------------------------------------------------------------------------


def test_floors_sum_over_what_is_counted() -> None:
    items: list[work.Work] = [
        work.Gemm(32, 16, 48),
        work.Gemm(32, 16, 48, batch=3),
        work.Attention(2, 16, 8, 24),
        work.Convolution(3, 5, (3, 3, 3), 2, 8, 8),
        work.Convolution(4, 4, (1, 3, 3), 1, 8, 8, stride=(1, 2, 2)),
        work.Convolution(4, 4, (1, 2, 2), 1, 8, 8),
    ]
    once = floors.floor_ms(items, CPU, torch.float32, torch.float32, repeats=3)
    many = floors.floor_ms(items * 50, CPU, torch.float32, torch.float32, repeats=3)
    assert 0 < once < many
    assert floors.floor_ms([items[0]], CPU, torch.float32, floors.FP8, repeats=1) > 0
    assert floors.copy_bytes_per_s(CPU, 2, 1 << 16) > 0


def test_a_floor_is_the_fastest_convolution_there_is() -> None:
    called = []

    def refuses(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        called.append(tuple(x.shape[1:]))
        raise FlashTalkError("it cannot")

    def instant(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x

    item = work.Convolution(16, 16, (3, 3, 3), 4, 64, 64)
    plain = floors.convolution_ms(item, CPU, torch.float32, 3, (refuses,))
    assert called == [(16, 6, 64, 64)], "the temporal context is in the input"
    assert floors.convolution_ms(item, CPU, torch.float32, 3, (refuses, instant)) < plain / 2
    for other in (
        work.Convolution(4, 4, (1, 3, 3), 1, 8, 8, stride=(1, 2, 2)),
        work.Convolution(4, 4, (1, 2, 2), 1, 8, 8),
    ):
        floors.convolution_ms(other, CPU, torch.float32, 1, (refuses,))
    assert len(called) == 2, "a picture that changes its size is not for them"


def made_up(flop: int | None, dtype: torch.dtype = torch.float32) -> tuple[OpSpec, Case]:
    """An op that reads and writes 4,000 bytes."""

    def make(device: torch.device, _: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        return {"x": torch.zeros(4000 // dtype.itemsize, device=device).to(dtype)}

    counts = None if flop is None else lambda x: flop
    spec = OpSpec("made_up", (Backend("torch", lambda _: None),), function=lambda x: x.clone(), flop=counts)
    return spec, Case("it", make)


@pytest.mark.parametrize(
    ("flop", "dtype", "attention_rate", "floor_ms"),
    [
        (None, torch.float32, 1e6, 8.0),  # 8,000 bytes at 1e6 a second
        (1_000, torch.float32, 1e6, 8.0),
        (20_000, torch.float32, 1e6, 10.0),  # at a product's 2e6 a second
        (20_000, torch.bfloat16, 1e6, 10.0),
        (25_000, torch.float32, 2.5e6, 10.0),  # at attention's, which is faster
        (40_000, ops.FP8, 2.5e6, 10.0),  # at 4e6
    ],
)
def test_a_floor_is_the_larger_of_bytes_and_operations(
    flop: int | None, dtype: torch.dtype, attention_rate: float, floor_ms: float
) -> None:
    spec, case = made_up(flop, dtype)
    rates = baselines.Rates(
        copy_bytes_per_s=1e6, flop_per_s=2e6, attention_flop_per_s=attention_rate, fp8_flop_per_s=4e6
    )
    row = baselines.measure_op(spec, case, CPU, torch.float32, rates, PLAN)
    assert row["floor_ms"] == pytest.approx(floor_ms)
    assert row["bytes"] == 8000 and row["flop"] == (flop or 0)
    assert row["ms"] > 0 and "reference_ms" not in row


def test_the_rates_are_measured_once() -> None:
    shared = bench.Baselines(PLAN)
    rates = shared.rates(CPU, torch.float32)
    assert all(rate > 0 for rate in dataclasses.astuple(rates))
    assert shared.rates(CPU, torch.float32) is rates


def test_the_rate_of_attention_is_that_of_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def attention_ms(item: work.Attention, *arguments: Any) -> float:
        taken.extend((item, *arguments))
        return 2.0

    monkeypatch.setattr(floors, "attention_ms", attention_ms)
    rates = bench.Baselines(PLAN).rates(CPU, torch.float32)
    assert taken == [PLAN.attention, CPU, torch.float32, 1, (ops.chunk_attention,)]
    assert rates.attention_flop_per_s == 4 * 2 * 32 * 32 * 16 / 2e-3


def test_the_attention_whose_rate_is_taken_is_the_14b_models() -> None:
    assert bench.Plan().attention == work.dit_self_attention(DiTConfig(), StreamConfig())[0]


def test_a_products_rate() -> None:
    ms = floors.gemm_ms(work.Gemm(256, 256, 256), CPU, torch.float32, 5)
    rate = floors.product_flop_per_s(CPU, torch.float32, 5, 256)
    assert 0.1 < rate * ms / 1e3 / (2 * 256**3) < 10


@pytest.mark.gpu
@pytest.mark.alone
def test_a_call_that_the_host_launches_slowly_is_timed_by_the_device() -> None:
    """Also where it shall run until the clocks settle: 0.1255 ms were once read of one that takes 0.09."""
    device = torch.device("cuda")
    x = torch.zeros(1 << 20, device=device)

    def slow_launch() -> None:
        time.sleep(5e-4)
        x.add_(1)

    assert timing.measure(slow_launch, device, settle_ms=20.0).median_ms < 0.1

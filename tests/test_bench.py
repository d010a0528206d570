"""The latency suite and the profiler, end to end on the CPU with tiny random models."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console, RenderableType

from flashtalk_rt import bench, ops
from flashtalk_rt.bench import baselines, models, plain, report, suite
from flashtalk_rt.cli import main
from flashtalk_rt.config import DiTConfig, StreamConfig
from flashtalk_rt.errors import FlashTalkError, InputError, OutputError
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.model import Model
from flashtalk_rt.ops import _dispatch
from flashtalk_rt.profiles import work
from flashtalk_rt.profiles.budgets import Budget, Budgets
from flashtalk_rt.profiles.record import check_latency, read_latency, write_result
from flashtalk_rt.runtime import Engine

CPU = torch.device("cpu")
PLAN = bench.Plan(
    chunks=3,
    repeats=1,
    op_repeats=1,
    compiler="eager",
    workloads=False,
    copy_bytes=1 << 16,
    product_size=64,
    attention=work.Attention(heads=2, queries=32, keys=32, head_dim=16),
)


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], list[str], list[int]]:
    """The result of a run, what it logged, and how often chunks were asked for at a time."""
    lines: list[str] = []
    asked: list[int] = []

    def repeat(call: Callable[[], object], times: int) -> None:
        asked.append(times)
        for _ in range(times):
            call()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ops, "REGISTRY", [spec for spec in ops.REGISTRY if spec.name in ("adaln", "layer_norm")]
        )
        record = bench.measure(
            tiny.model(), 2, "fp32", 32, 48, bench.Baselines(PLAN), repeat=repeat, log=lines.append
        )
    return record, lines, asked


def shown(renderable: RenderableType) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def row_of(text: str, name: str) -> list[str]:
    """The cells of a table's row beside its name."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    (found,) = [cells[1:] for cells in rows if cells[:1] == [name]]
    return found


def test_a_run_gives_a_valid_result(measured: tuple[Any, ...], tmp_path: Path) -> None:
    record, lines, asked = measured
    check_latency(record, "the run")
    assert asked == [3] and len(lines) == 7
    assert (record["height"], record["width"], record["steps"], record["precision"]) == (32, 48, 2, "fp32")
    assert record["gpus"] == 0 and record["commit"]
    figures = record["figures"]
    assert figures["first_frame_ms"] < figures["last_frame_ms"] < figures["chunk_ms"]
    assert 2 * figures["dit_step_ms"] + figures["vae_decode_ms"] < figures["chunk_ms"]
    assert (
        set(record["errors"]) == {"dit_step", "vae_decode", "vae_encode"}
        and max(record["errors"].values()) < 1e-4
    )
    assert set(record["ops"]) == {"adaln", "layer_norm"}
    assert all(
        row["ms"] > 0 and row["floor_ms"] > 0 and row["reference_ms"] > 0 for row in record["ops"].values()
    )
    assert record["copy_tb_per_s"] > 0 and set(record["product_tflop_per_s"]) == {"float32", "float8_e4m3fn"}
    path = tmp_path / "result.json"
    write_result(path, record)
    assert read_latency(path) == record


def test_the_table_says_there_are_no_budgets(measured: tuple[Any, ...]) -> None:
    text = shown(bench.table(measured[0], None))
    assert "no budgets for this device" in text and "dit step" in text and "adaln" in text


def test_the_table_shows_budgets_or_why_none_hold(measured: tuple[Any, ...]) -> None:
    record = measured[0]
    one = (Budget("dit_step_ms", target=12345.0, stretch=1234.0, published=54321.0),)
    text = shown(bench.table(record, Budgets(record["device"], 0, 32, 48, one)))
    assert "12,345" in text and "1,234" in text and "54,321" in text and "no budgets" not in text
    assert "7,654" in shown(bench.table(record, Budgets(record["device"], 0, 32, 48, one, {"adaln": 7654.0})))
    assert "no budgets for this size" in shown(bench.table(record, Budgets("it", 1, 768, 448, one)))


def test_a_whole_row_of_a_stage_and_of_an_op(measured: tuple[Any, ...]) -> None:
    record = copy.deepcopy(measured[0])
    for of, value in (("figures", 12.0), ("p95", 13.0), ("floors", 10.0), ("reference", 30.0)):
        record[of]["dit_step_ms"] = value
    record["ops"]["adaln"] |= {"ms": 0.6, "p95_ms": 0.7, "floor_ms": 0.4, "reference_ms": 0.9}
    one = (Budget("dit_step_ms", target=15.0, stretch=14.0, published=40.0),)
    text = shown(bench.table(record, Budgets(record["device"], 0, 32, 48, one, {"adaln": 0.8})))
    # unit, median, p95, budget, stretch, floor, ratio, plain path, published
    assert row_of(text, "dit step") == ["ms", "12", "13", "15", "14", "10", "1.20", "30", "40"]
    # median, p95, budget, floor, ratio, plain path
    assert row_of(text, "adaln") == ["0.6", "0.7", "0.8", "0.4", "1.50", "0.9"]


def test_ops_stand_beside_the_figures_of_their_own_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "REGISTRY", [spec for spec in ops.REGISTRY if spec.name == "adaln"])
    monkeypatch.setattr(suite, "OPS_SIZE", (16, 32))
    shared = bench.Baselines(dataclasses.replace(PLAN, chunks=1, workloads=True))
    own = bench.measure(tiny.model(), 1, "fp32", 16, 32, shared, plain=False)
    other = bench.measure(tiny.model(), 1, "fp32", 32, 16, shared, plain=False)
    assert set(own["ops"]) == {"adaln"} and "ops" not in other
    assert "Operators" in shown(bench.table(own, None))
    assert "Operators" not in shown(bench.table(other, None))


def test_numbers() -> None:
    assert [report.number(x) for x in (None, 0.123456, 12.0, 54321.6)] == ["-", "0.1235", "12", "54,322"]
    assert report.ratio(3.0, None) == "-" and report.ratio(3.0, 2.0) == "1.50"


def test_baselines_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(name: str) -> None:
        real = getattr(baselines, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(baselines, name, call)

    for name in ("plain_timings", "measure_floors", "measure_ops"):
        counted(name)
    monkeypatch.setattr(ops, "REGISTRY", [spec for spec in ops.REGISTRY if spec.name == "adaln"])
    shared = bench.Baselines(dataclasses.replace(PLAN, chunks=1))
    first = bench.measure(tiny.model(), 1, "bf16", 32, 32, shared)
    second = bench.measure(tiny.model(), 2, "bf16", 32, 32, shared)
    assert sorted(calls) == ["measure_floors", "measure_ops", "plain_timings"]
    assert first["floors"]["color_ms"] == second["floors"]["color_ms"]
    other = bench.measure(tiny.model(), 1, "bf16", 16, 32, shared, plain=False)
    assert calls[3:] == ["measure_floors"]
    check_latency(other, "a run without the plain path")
    assert set(other["reference"].values()) == {None}
    bench.plot(other, tmp_path / "plot.png")
    assert "plain path" in shown(bench.table(other, None))


def test_the_floor_counts_the_form_that_runs() -> None:
    """Which a CPU never absorbs: `audio_form` asks no device, so a GPU's answer can be had here."""
    assert baselines.audio_form(DiTConfig(), StreamConfig(), torch.device("cuda")) == "absorbed"
    assert baselines.audio_form(DiTConfig(), StreamConfig(), CPU) == "plain"


def test_the_plot(measured: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured[0]
    bench.plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"plot\.what"):
        bench.plot(record, tmp_path / "plot.what")
    with pytest.raises(OutputError, match="cannot be written"):
        bench.plot(record, tmp_path / "no" / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="needs matplotlib"):
        bench.plot(record, tmp_path / "other.png")


# --- correctness before speed -----------------------------------------------------------------------


STREAM = dataclasses.replace(tiny.STREAM, height=32, width=32)


@pytest.mark.parametrize("network", ["dit", "vae"])
@pytest.mark.parametrize("damage", [0.02, float("nan")])
def test_a_wrong_result_is_not_timed(network: str, damage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaging(Engine):
        """Changes one weight of the network while it prepares it."""

        def __init__(self, model: Model, *arguments: Any, **more: Any) -> None:
            super().__init__(model, *arguments, **more)
            parts = {"dit": model.dit.head.head.weight, "vae": model.vae.conv2.weight}
            with torch.no_grad():
                parts[network] += damage

    monkeypatch.setattr(plain, "Engine", Damaging)
    with pytest.raises(FlashTalkError, match=r"(dit_step|vae_decode) in fp32 is off by .* nothing was timed"):
        plain.check_results(tiny.model(), STREAM, "fp32")


def test_the_plain_path_leaves_no_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[DiT]] = []

    def kept(*arguments: Any) -> DiT:
        dit = models.random_dit(*arguments)
        made.append(weakref.ref(dit))
        return dit

    monkeypatch.setattr(plain, "random_dit", kept)
    model = tiny.model()
    gc.disable()
    try:
        plain.plain_timings(model, STREAM, torch.float32, "eager", 1)
        torch.compiler.reset()
        assert made and all(dit() is None for dit in made)
    finally:
        gc.enable()


def test_right_results_pass() -> None:
    assert max(plain.check_results(tiny.model(), STREAM, "fp32").values()) < 1e-5
    assert 1e-4 < max(plain.check_results(tiny.model(), STREAM, "bf16").values()) < 0.1


def test_the_plain_path_uses_the_plain_backend_and_only_inside() -> None:
    spec = _dispatch.OpSpec("made_up", (_dispatch.Backend("fast", lambda _: None), _dispatch.TORCH))

    def backend() -> str:
        return _dispatch.backend_for(spec, CPU, torch.float32)

    assert backend() == "fast"
    with pytest.raises(KeyError), ops.plain_backends():
        assert backend() == "torch"
        raise KeyError
    assert backend() == "fast"


# --- models ------------------------------------------------------------------------------------------


def test_what_float8_costs() -> None:
    result = bench.fp8_quality(tiny.model())
    layers = tiny.DIT.num_layers
    assert len(result["frames_psnr_db"]) == 2 and min(result["frames_psnr_db"]) > 10
    errors = result["block_relative_errors"]
    assert len(errors) == layers and all(1e-4 < error < 0.2 for error in errors)
    assert 1e-4 < result["step_relative_error"] < 0.2
    for name, columns in result["inputs"].items():
        assert {len(column) for column in columns.values()} == {layers}, name
        for largest, median, error in zip(*columns.values(), strict=True):
            # A row's largest magnitude is at least its root mean square; e4m3 keeps three bits.
            assert largest >= median >= 1 and 0.005 < error < 0.05, name
    json.dumps(result, allow_nan=False)


def test_an_outlier_shows() -> None:
    x = torch.randn(3, 64)
    x[1, 5] = 1000
    assert bench.quality.outliers(x)["crest_largest"] == pytest.approx(8, rel=0.01)  # sqrt(64)
    assert bench.quality.outliers(torch.ones(2, 16)) == {
        "crest_largest": pytest.approx(1),
        "crest_median": pytest.approx(1),
        "rounding_error": pytest.approx(0, abs=1e-6),
    }


def test_a_random_model_listens_with_wav2vec2_and_streams() -> None:
    config = dataclasses.replace(tiny.DIT, audio_blocks=12, audio_dim=768)
    stream = StreamConfig(height=16, width=16, steps=1)
    model = models.random_model(CPU, config, tiny.VAE_SMALL, stream)
    assert {p.dtype for network in (model.dit, model.vae) for p in network.parameters()} == {torch.bfloat16}
    assert isinstance(model.audio_encoder, torch.nn.Module)
    assert {p.dtype for p in model.audio_encoder.parameters()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32
    engine = Engine(model, precision="fp32")
    session = engine.session(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
    session.push_audio(0.1 * torch.randn(stream.chunk_samples))
    (chunk,) = session
    assert chunk.frames.shape == (28, 16, 16, 3)


def test_an_op_that_computes_something_else_is_not_timed() -> None:
    x = torch.randn(4, 64)
    quantized = ops.quantize(x)
    baselines.check_op("both", (x, quantized), (x.half(), quantized))
    for wrong in (x + 0.1, x * float("nan")):
        with pytest.raises(FlashTalkError, match=r"both is .* of its size from its plain form's result"):
            baselines.check_op("both", (x, ops.Quantized(*quantized)), (x, ops.quantize(wrong)))


def test_random_encoders_say_the_same_to_every_session() -> None:
    """Else no two sessions of a random model could be compared."""
    image, text = models.RandomImageEncoder(8), models.RandomTextEncoder(4, 8)
    picture = torch.zeros(1, 3, 1, 16, 16)
    assert torch.equal(image(picture), image(picture))
    assert torch.equal(text("a"), text("a"))


def test_the_14b_model_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="needs a GPU"):
        bench.published_model("cpu")


def test_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    for command in (["bench"], ["profile", "--checkpoint", "random"]):
        assert main([*command, "--out", str(tmp_path / "out.json")]) == 2
        assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench", "--steps", "0"], "--steps is 0"),
        (["bench", "--size", "768"], "--size is '768'"),
        (["bench", "--precision", "int4"], "--precision is 'int4'"),
        (["bench", "--out", "no/such/bench.json"], "--out no/such/bench.json"),
        (["bench", "--plot", "no/such/plot.png"], "--plot no/such/plot.png"),
        (["profile", "--device", "tpu"], "--device is 'tpu'"),
        (["profile", "--out", "no/such/trace.json"], "--out no/such/trace.json"),
        (["profile", "--steps", "-1"], "--steps is -1"),
        (["bench", "--what"], "--what"),
    ],
)
def test_bad_options_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "profile"])
@pytest.mark.parametrize(("name", "text"), [("folder", "is a folder"), ("pipe", "a device or a pipe")])
def test_what_is_no_file_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, text: str
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert main([command, "--out", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert text in err and f"--out {tmp_path / name}" in err
    assert (tmp_path / "folder").is_dir() and (tmp_path / "pipe").is_fifo()

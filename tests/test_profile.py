"""`flashtalk profile`, end to end on the CPU, and its tables of made-up profiles."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import torch
from rich.console import Console
from streams import gpu_model

from flashtalk_rt import profile as profiler
from flashtalk_rt.bench import Baselines
from flashtalk_rt.cli import main
from flashtalk_rt.config import DiTConfig, StreamConfig, VAEConfig
from flashtalk_rt.errors import OutputError
from flashtalk_rt.profile import Kernel, Kind, Profile, Stage
from flashtalk_rt.runtime import Engine

STREAM = dataclasses.replace(tiny.STREAM, height=32, width=32)


def test_profile_writes_a_trace_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    command = ["profile", "--device", "cpu", "--precision", "fp32", "--steps", "2", "--size", "32x48"]
    assert main([*command, "--out", str(trace)]) == 0
    text = capsys.readouterr().out
    for named in (
        "audio",
        "dit",
        "vae decode",
        "color",
        "vae encode",
        "TFLOP/s",
        "products",
        "convolutions",
        "aten::",
        f"{trace}: the trace",
    ):
        assert named in text
    events = json.loads(trace.read_text())["traceEvents"]
    ranges = [event["name"] for event in events if str(event.get("name")).startswith("chunk/")]
    assert ranges.count("chunk/dit") == 2 and ranges.count("chunk/vae_decode") == 9
    assert {"chunk/audio", "chunk/color", "chunk/vae_encode"} <= set(ranges)


def test_a_profile_adds_up(tmp_path: Path) -> None:
    engine = Engine(tiny.model(), steps=2, precision="fp32", height=32, width=32)
    made = profiler.profile_chunk(engine, tmp_path / "trace.json")
    assert [stage.name for stage in made.stages] == ["audio", "dit", "vae_decode", "color", "vae_encode"]
    assert all(stage.ms > 0 for stage in made.stages)
    times = [kernel.ms for kernel in made.kernels]
    assert times == sorted(times, reverse=True) and all(kernel.calls > 0 for kernel in made.kernels)
    assert not [kernel.name for kernel in made.kernels if kernel.name.startswith("chunk/")]
    # Operators on one thread take no longer than the stages that hold them, and most of that.
    assert 0.3 < sum(times) / sum(stage.ms for stage in made.stages) < 1.1
    dit = made.stages[1]
    assert dit.flop == 2 * sum(item.flop for item in profiler.work.dit_step(tiny.DIT, STREAM))


@pytest.mark.gpu
def test_a_profile_sees_the_kernels_inside_the_graphs(tmp_path: Path) -> None:
    engine = Engine(gpu_model(wide=True), steps=2, precision="bf16", height=64, width=64)
    made = profiler.profile_chunk(engine, tmp_path / "trace.json")
    engine.close()
    calls = {kernel.name: kernel.calls for kernel in made.kernels}
    layers = engine.model.dit.config.num_layers
    # In each step a layer normalises its q and k, and the q of its text and image attention.
    assert sum(calls[name] for name in calls if "qk_norm_rope" in name) == 2 * 3 * layers
    assert not [name for name in calls if name.startswith(("aten::", "cuda", "chunk/"))]
    times = [kernel.ms for kernel in made.kernels]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    # Of a model this small most of a stage's time lies between the kernels.
    assert 0.02 < sum(times) / sum(stage.ms for stage in made.stages) < 1.1
    assert {kind.name for kind in made.kinds if kind.ms > 0} >= {"attention", "convolutions", "products"}


def test_a_trace_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    with pytest.raises(OutputError, match="cannot be written"):
        profiler.profile_chunk(engine, tmp_path / "no" / "trace.json")
    # As when the exporter could not write, which it only logs.
    monkeypatch.setattr(profiler.torch_profile, "export_chrome_trace", lambda *_: None)
    with pytest.raises(OutputError, match="cannot be written"):
        profiler.profile_chunk(engine, tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())


def test_a_trace_replaces_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "trace.json.tmp").write_text("of somebody else")
    (tmp_path / "link.json").symlink_to("trace.json")
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=16, width=16)
    profiler.profile_chunk(engine, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "trace.json").read_text())
    assert (tmp_path / "trace.json.tmp").read_text() == "of somebody else"


# --- floors and kinds ----------------------------------------------------------------------------------

STAGES = (
    Stage("audio", 1.5, None, None),
    Stage("dit", 2800.0, 10**15, 10**11),
    Stage("vae_decode", 180.0, 10**14, None),
    Stage("color", 0.3, None, 10**9),
    Stage("vae_encode", 20.0, 10**13, None),
)
KERNELS = (
    Kernel("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", 640, 1500.0),
    Kernel("flashtalk::attention::(anonymous namespace)::chunk_attention_kernel(Arguments)", 160, 700.0),
    Kernel("residual_norm_kernel", 320, 100.0),
)
PROFILE = Profile("it", STAGES, profiler.kinds_of(KERNELS, {"products": 10**15, "attention": 5}), KERNELS)


def text_of(profile: Profile) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(profiler.table(profile))
    return console.export_text()


def rows_of(text: str, name: str) -> list[list[str]]:
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines()]
    return [row for row in cells if row[0] == name]


def engine(device: str, precision: str = "bf16") -> Engine:
    """What `beside_floors` and `flop_of_kinds` ask of an engine of the 14B model."""
    made = SimpleNamespace(
        model=SimpleNamespace(
            stream=StreamConfig(),
            dit=SimpleNamespace(config=DiTConfig()),
            vae=SimpleNamespace(config=VAEConfig()),
        ),
        device=torch.device(device),
        height=768,
        width=448,
        steps=4,
        precision=precision,
    )
    return cast(Engine, made)


def test_a_gpus_stages_stand_beside_their_floors() -> None:
    asked: list[Any] = []

    class Known(Baselines):
        def floors(self, model: Any, stream: StreamConfig, precision: Any) -> dict[str, float]:
            asked.append((stream.height, stream.width, precision))
            return {"dit_step_ms": 500.0, "vae_decode_ms": 160.0, "vae_encode_ms": 16.0, "color_ms": 0.15}

    made = profiler.beside_floors(PROFILE, engine("cuda"), Known())
    assert asked == [(768, 448, "bf16")]
    assert [stage.floor_ms for stage in made.stages] == [None, 2000.0, 160.0, 0.15, 16.0]
    text = text_of(made)
    assert rows_of(text, "dit")[0][3:5] == ["2000.00", "1.40"]
    assert rows_of(text, "audio")[0][3:5] == ["-", "-"]
    assert profiler.FLOORS in text and profiler.NO_FLOORS not in text


def test_a_cpu_measures_no_floor_and_says_so() -> None:
    assert profiler.beside_floors(PROFILE, engine("cpu"), Baselines()) is PROFILE
    text = text_of(PROFILE)
    assert profiler.NO_FLOORS in text and rows_of(text, "dit")[0][3:5] == ["-", "-"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "products"),
        (
            "void cutlass::device_kernel<at::cuda::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel>>",
            "products",
        ),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("aten::bmm", "products"),
        ("aten::baddbmm", "products"),
        ("aten::_scaled_mm", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128", "attention"),
        ("flashtalk::attention::cross::(anonymous namespace)::cross_attention_kernel()", "attention"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("forward_kernel", "attention"),
        ("resident_kernel", "attention"),
        ("audio_cross_attention_kernel", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("flashtalk::(anonymous namespace)::slice_conv_kernel<__half>(CUtensorMap)", "convolutions"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc", "convolutions"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("head_taps_kernel", "convolutions"),
        ("void cudnn::ops::convertTensor_kernel<float>", "other"),
        ("residual_norm_kernel", "other"),
        ("grouped_softmax_kernel", "other"),
        ("quantize_kernel", "other"),
        ("aten::copy_", "other"),
        ("aten::add", "other"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
        ("Memcpy DtoH (Device -> Pinned)", "other"),
    ],
)
def test_a_kernels_name_tells_its_kind(kernel: str, kind: str) -> None:
    assert profiler.kind_of(kernel) == kind


def test_kinds_have_rates_where_operations_are_counted() -> None:
    assert PROFILE.kinds == (
        Kind("products", 1500.0, 10**15),
        Kind("attention", 700.0, 5),
        Kind("other", 100.0, None),
        Kind("convolutions", 0.0, None),
    )
    text = text_of(PROFILE)
    assert rows_of(text, "products") == [["products", "1500.00", "65.2", "1000", "666.7"]]
    assert rows_of(text, "other") == [["other", "100.00", "4.3", "-", "-"]]


def test_the_14b_models_operations_by_kind() -> None:
    """The stages' own numbers, in the form that runs: 340 TFLOP of linear layers a step less 37 absorbed."""
    flop = profiler.flop_of_kinds(engine("cuda"), 32, 257)
    assert flop["products"] / 1e12 == pytest.approx(4 * (340 - 37), rel=0.01)
    assert flop["attention"] / 1e12 == pytest.approx(4 * (120 + 2.9), rel=0.01)
    assert flop["convolutions"] / 1e12 == pytest.approx(97 - 24 + 13, rel=0.2)
    plain = profiler.flop_of_kinds(engine("cpu"), 32, 257)
    assert plain["products"] / 1e12 == pytest.approx(4 * 340, rel=0.01)
    assert plain["attention"] > flop["attention"] and plain["convolutions"] == flop["convolutions"]


def test_a_profiler_that_saw_no_kernel_is_said(tmp_path: Path) -> None:
    engine = Engine(tiny.model(), steps=1, precision="fp32", height=32, width=32)
    blind = dataclasses.replace(profiler.profile_chunk(engine, tmp_path / "trace.json"), kernels=(), kinds=())
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(profiler.table(blind))
    text = console.export_text()
    assert "vae decode" in text and "saw no kernel" in text

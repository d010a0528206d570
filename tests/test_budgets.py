"""Budgets as data, result files, and the arithmetic that floors are made of."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtalk_rt import ops
from flashtalk_rt.bench.suite import OPS_SIZE
from flashtalk_rt.config import DiTConfig, StreamConfig, VAEConfig
from flashtalk_rt.errors import InputError, OutputError
from flashtalk_rt.modules.vae import VAE
from flashtalk_rt.profiles import budgets as budgets_module
from flashtalk_rt.profiles import record, timing, work
from flashtalk_rt.profiles.budgets import Budget, BudgetError, Budgets, load_budgets
from flashtalk_rt.profiles.record import FIGURES, check_latency, read_latency, write_result

CPU = torch.device("cpu")
H100 = "NVIDIA H100 80GB HBM3"


def result(**changes: Any) -> dict[str, Any]:
    """A latency result of an H100 that keeps every budget."""
    figures = {
        "dit_step_ms": 700.0,
        "vae_decode_ms": 200.0,
        "vae_encode_ms": 20.0,
        "color_ms": 0.9,
        "chunk_ms": 3100.0,
        "first_frame_ms": 2900.0,
        "peak_memory_gb": 50.0,
        "first_chunk_ms": 9000.0,
    }
    return {
        "device": H100,
        "gpus": 1,
        "commit": "abc1234",
        "torch": "2.13.0",
        "precision": "bf16",
        "height": 768,
        "width": 448,
        "steps": 4,
        "figures": figures,
        "floors": {**figures, "dit_step_ms": 660.0, "peak_memory_gb": None},
        "reference": {**figures, "peak_memory_gb": None},
        "spreads": dict.fromkeys(figures, 0.0),
        **changes,
    }


def with_figure(name: str, value: float, **changes: Any) -> dict[str, Any]:
    made = result(**changes)
    made["figures"][name] = value
    return made


def h100() -> Budgets:
    found = load_budgets(H100)
    assert found is not None
    return found


# --- budgets ----------------------------------------------------------------------------------------


def test_a_result_within_its_budgets_passes() -> None:
    h100().check(result())


@pytest.mark.parametrize(
    ("figure", "value", "changes", "budget"),
    [
        ("dit_step_ms", 731.0, {}, "730"),
        ("dit_step_ms", 491.0, {"precision": "fp8"}, "490"),
        ("vae_decode_ms", 220.5, {}, "220"),
        ("vae_encode_ms", 22.1, {}, "22"),
        ("color_ms", 1.01, {}, "1"),
        ("chunk_ms", 3201.0, {}, "3200"),
        ("chunk_ms", 2301.0, {"precision": "fp8"}, "2300"),
        ("chunk_ms", 751.0, {"precision": "fp8", "steps": 1}, "750"),
        ("peak_memory_gb", 36.1, {"precision": "fp8"}, "36"),
        ("first_chunk_ms", 30_001.0, {}, "30000"),
        ("color_ms", float("nan"), {}, "1"),
    ],
    ids=str,
)
def test_a_breach_names_the_stage_the_figure_and_the_budget(
    figure: str, value: float, changes: dict[str, Any], budget: str
) -> None:
    with pytest.raises(BudgetError, match=rf"{figure} is {value:.6g}, its budget {budget}(;|$)"):
        h100().check(with_figure(figure, value, **changes))


def test_a_breach_of_the_floor_ratio() -> None:
    slow = with_figure("dit_step_ms", 725.0)
    slow["floors"]["dit_step_ms"] = 600.0
    with pytest.raises(BudgetError, match=r"1\.21 times its floor 600; its budget is 1\.15 times"):
        h100().check(slow)


def test_a_figure_that_lacks_is_a_breach() -> None:
    forgetful = result()
    del forgetful["figures"]["first_chunk_ms"]
    with pytest.raises(BudgetError, match="first_chunk_ms has a budget and was not measured"):
        h100().check(forgetful)


def test_every_breach_is_named() -> None:
    slow = with_figure("color_ms", 5.0)
    slow["figures"]["vae_decode_ms"] = 900.0
    with pytest.raises(BudgetError) as error:
        h100().check(slow)
    assert "color_ms" in str(error.value) and "vae_decode_ms" in str(error.value)


def with_op(name: str, ms: float, **changes: Any) -> dict[str, Any]:
    return result(ops={name: {"ms": ms, "p95_ms": ms, "floor_ms": ms}}, **changes)


@pytest.mark.parametrize(
    ("op", "ms", "budget"),
    [
        ("chunk_attention", 4.71, "4.7"),
        ("dual_cross_attention", 0.201, "0.2"),
        ("adaln", float("nan"), "0.101"),
    ],
)
def test_a_breach_of_an_op_names_it(op: str, ms: float, budget: str) -> None:
    for precision in ("bf16", "fp8"):
        with pytest.raises(BudgetError, match=rf"ops\.{op}\.ms is {ms:.6g}, its budget {budget}$"):
            h100().check(with_op(op, ms, precision=precision))
    h100().check(with_op(op, 0.09))
    h100().check(with_op(op, ms, height=720, width=416))
    h100().check(with_op("an_op_without_a_budget", 1e6))


def test_the_ops_are_timed_at_the_size_that_has_budgets() -> None:
    assert OPS_SIZE == (h100().height, h100().width) == (StreamConfig().height, StreamConfig().width)


@pytest.mark.parametrize("device", [H100, "NVIDIA H200"])
def test_every_op_that_is_timed_has_a_budget(device: str) -> None:
    budgets = load_budgets(device)
    assert budgets is not None
    assert set(budgets.ops) == {spec.name for spec in ops.REGISTRY if spec.workload is not None}
    assert all(ms > 0 for ms in budgets.ops.values())


@pytest.mark.parametrize("changes", [{"gpus": 2}, {"height": 720}, {"width": 416}], ids=str)
def test_another_size_or_number_of_gpus_has_no_budgets(changes: dict[str, Any]) -> None:
    assert h100().of(result(**changes)) == {}
    h100().check(with_figure("dit_step_ms", 1e6, **changes))


def test_precision_and_steps_choose() -> None:
    of = h100().of
    assert of(result())["dit_step_ms"].stretch == 680 and of(result())["dit_step_ms"].floor_ratio == 1.15
    assert of(result(precision="fp8"))["dit_step_ms"].target == 490
    assert "chunk_ms" not in of(result(steps=2)) and "color_ms" in of(result(steps=2))


def test_a_device_without_a_file_has_none() -> None:
    assert load_budgets("Some CPU @ 3.0 GHz") is None


@pytest.mark.parametrize(
    "text",
    [
        "device = ",
        'device = "x"\ngpus = 1\nheight = 1\nwidth = 1',
        'device = "x"\ngpus = 1\nheight = 1\nwidth = 1\n[[budget]]\nfigure = "a"',
        'device = "x"\ngpus = 1\nheight = 1\nwidth = 1\n[[budget]]\nfigure = "a"\ntarget = 1\nspeed = 2',
        "[[budget]]\nfigure = 'a'\ntarget = 1",
        'device = "x"\ngpus = 1\nheight = 1\nwidth = 1\nbudget = []\nops = 1',
        'device = "x"\ngpus = 1\nheight = 1\nwidth = 1\nbudget = []\n[ops]\nadaln = "fast"',
        'device = "x"\ngpus = 1\nheight = 1\nwidth = 1\nbudget = []\n[ops]\nadaln = [1]',
    ],
)
def test_a_bad_file_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets_module, "FOLDER", tmp_path)
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(InputError, match=r"x\.toml"):
        load_budgets("X")


def test_every_budget_file_is_read_and_is_under_its_own_name() -> None:
    files = sorted(budgets_module.FOLDER.glob("*.toml"))
    assert files
    for path in files:
        device = next(line for line in path.read_text().splitlines() if line.startswith("device"))
        found = load_budgets(device.split('"')[1])
        assert found is not None and found.budgets
        assert {b.figure for b in found.budgets} <= {*FIGURES, "first_chunk_ms"}
        assert all(b.stretch is None or b.stretch < b.target for b in found.budgets)


def test_a_budget_equal_to_the_figure_holds() -> None:
    assert Budget("x_ms", 5.0).breaches(5.0, None) == []


# --- result files -----------------------------------------------------------------------------------


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_result(path, result())
    assert read_latency(path) == result()


def removed(made: dict[str, Any], *keys: str) -> dict[str, Any]:
    made = copy.deepcopy(made)
    inner = made
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return made


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([], "not a JSON object"),
    **{
        f"no {name}": (removed(result(), name), name)
        for name in ("device", "gpus", "commit", "torch", "precision", "height", "width", "steps")
    },
    **{
        f"no {name}": (removed(result(), name), name)
        for name in ("figures", "floors", "reference", "spreads")
    },
    **{f"no figure {name}": (removed(result(), "figures", name), name) for name in FIGURES},
    "no floor": (removed(result(), "floors", "color_ms"), "floors has no color_ms"),
    "a size as text": (result(height="768"), "height is '768'"),
    "a boolean": (result(gpus=True), "gpus is True"),
    "a figure as text": (with_figure("chunk_ms", "fast"), r"figures\.chunk_ms is 'fast'"),  # type: ignore[arg-type]
    "a figure not measured": (with_figure("chunk_ms", None), r"figures\.chunk_ms is None"),  # type: ignore[arg-type]
    "a figure of zero": (with_figure("chunk_ms", 0.0), r"figures\.chunk_ms is 0\.0"),
    "NaN": (with_figure("chunk_ms", float("nan")), r"figures\.chunk_ms is nan"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_result_is_named(bad: str) -> None:
    made, named = BAD[bad]
    with pytest.raises(InputError, match=rf"some\.json.*{named}"):
        check_latency(made, "some.json")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(InputError, match=r"result\.json cannot be read"):
        read_latency(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"result\.json is not JSON"):
        read_latency(path)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_result(tmp_path / "file" / "result.json", {})
    with pytest.raises(ValueError):
        write_result(tmp_path / "nan.json", {"x": float("nan")})
    assert not (tmp_path / "nan.json").exists()


def test_committed_latency_results_are_valid() -> None:
    for path in (Path(__file__).parents[1] / "profiles" / "results").glob("latency-*.json"):
        made = read_latency(path)
        assert record.result_name(made) == path.name
        assert ("ops" in made) == ((made["height"], made["width"]) == OPS_SIZE), path.name


def test_the_environment_of_a_cpu() -> None:
    made = record.environment(CPU)
    assert made["gpus"] == 0 and made["device"] and made["torch"] == torch.__version__
    json.dumps(made)


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    tracked.write_text("a")
    assert record.commit_of(tracked) == "unknown"
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD")
    untracked.write_text("a result, say")
    assert record.commit_of(tracked) == commit
    assert record.commit_of(untracked) == "unknown", "a copy below another project's checkout"
    tracked.write_text("b")
    assert record.commit_of(tracked) == f"{commit}-dirty"


def test_a_copy_without_git_says_its_commit(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "COMMIT").write_text("abc1234\n")
    assert record.commit_of(tmp_path / "profiles" / "record.py") == "abc1234"


# --- the arithmetic -----------------------------------------------------------------------------------


def test_the_work_is_what_the_design_says() -> None:
    """TFLOP of the published sizes, counted by hand when the runtime was designed."""
    dit, vae = DiTConfig(), VAEConfig()
    for stream, (linears, attention, decode) in {
        StreamConfig(): (340, 120, 97),
        StreamConfig(height=720, width=416): (296, 91, 84),
    }.items():
        counted = [work.dit_linears(dit, stream), work.dit_self_attention(dit, stream)]
        counted.append(work.vae_decode(vae, stream))
        tflop = [work.total_flop(items) / 1e12 for items in counted]
        assert tflop == pytest.approx([linears, attention, decode], rel=0.006)
        own = work.dit_main_linears(dit, stream) + work.dit_audio_linears(dit, stream, "absorbed")
        audio = ops.AudioWork(work.tokens(stream), 9, dit.context_tokens, dit.num_heads, dit.dim)
        saved = audio.plain_flops - 4 * audio.tokens * dit.dim * dit.context_tokens - audio.absorbed_flops
        assert work.total_flop(work.dit_linears(dit, stream)) - work.total_flop(own) == dit.num_layers * saved
    cross = work.total_flop(work.dit_cross_attention(dit, StreamConfig())) / 1e12
    assert cross == pytest.approx(7.6, rel=0.05)  # there without audio
    assert (
        work.tokens(StreamConfig()) == 12_096 and work.tokens(StreamConfig(height=720, width=416)) == 10_530
    )


def test_folded_upsampling_takes_less() -> None:
    def upsampling(folded: bool) -> int:
        items = work.vae_decode(VAEConfig(), StreamConfig(), folded)
        kernel = (1, 2, 2) if folded else (1, 3, 3)
        return sum(
            item.flop for item in items if isinstance(item, work.Convolution) and item.kernel == kernel
        )

    assert upsampling(False) == 2.25 * upsampling(True) > 0


def test_encoding_is_counted_a_call_at_a_time() -> None:
    """The first latent frame and the four frames behind it are one call, which changes no sum."""

    def items(motion_frames: int) -> list[work.Work]:
        return work.vae_encode(VAEConfig(), StreamConfig(motion_frames=motion_frames))

    one, five, nine = (work.total_flop(items(frames)) for frames in (1, 5, 9))
    assert five - one == nine - five > 2 * one
    assert len(items(5)) == len(items(9)) / 2 and items(9)[: len(items(5))] == items(5)


@pytest.mark.parametrize("motion_frames", [1, 5, 9])
@torch.no_grad()
def test_the_convolutions_counted_are_those_that_encode(motion_frames: int) -> None:
    vae = VAE(VAEConfig(dim=4, num_res_blocks=1))
    found: list[tuple[Any, ...]] = []

    def note(layer: Any, inputs: Any, y: torch.Tensor) -> None:
        flat = y.dim() == 4  # a 2D layer, whose frames are a batch
        frames, kernel = (len(y), (1, *layer.kernel_size)) if flat else (y.shape[2], layer.kernel_size)
        found.append((*layer.weight.shape[1::-1], kernel, frames, *y.shape[-2:]))

    for layer in vae.encoder.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
            layer.register_forward_hook(note)
    vae.encode(torch.zeros(1, 3, motion_frames, 16, 32))
    stream = StreamConfig(height=16, width=32, motion_frames=motion_frames)
    counted = [
        (item.in_dim, item.out_dim, item.kernel, item.frames, item.height, item.width)
        for item in work.vae_encode(vae.config, stream)
        # Attention's projections are linear layers there.
        if isinstance(item, work.Convolution) and (item.in_dim, item.kernel) != (16, (1, 1, 1))
    ]
    assert sorted(found) == sorted(counted)


def test_a_timing() -> None:
    made = timing.Timing((3.0, 1.0, 2.0, 10.0))
    assert (made.median_ms, made.p95_ms, made.spread_ms) == (2.5, 10.0, 9.0)
    assert timing.Timing(tuple(map(float, range(1, 101)))).p95_ms == 95.0
    with pytest.raises(ValueError):
        timing.Timing(())


def test_measure_calls_in_turn_and_does_not_count_the_warm_up() -> None:
    calls: list[int] = []
    made = timing.measure(calls.append, CPU, [(1,), (2,), (3,)], repeats=4, warm_ups=2)
    assert calls == [1, 2, 3, 1, 2, 3] and len(made.samples_ms) == 4
    assert timing.rotation(lambda: 7, 1, CPU) == [7]

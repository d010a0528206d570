"""`flashtalk profile`: one chunk under torch's profiler: a trace, and its time by stage, kind and kernel.

Operations are counted from the configs (`profiles.work`) and bytes from the weights and frames that a stage
cannot avoid touching, so a stage's rates are what the published work asks for over the time it took, whatever
was launched.  Kernels have none of their own: what one works on, no name tells.  Their kinds have, of the
work in the form that runs (audio's projections absorbed, upsampling folded).
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Group, RenderableType
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from .bench.baselines import Baselines, audio_form
from .bench.models import PROMPT_TOKENS, published_model
from .cli import say, show
from .config import StreamConfig
from .errors import OutputError
from .files import check_output
from .modules.weights import load
from .options import PRECISION_HELP, check_device, check_device_name, check_settings, dtype_of
from .profiles import work
from .runtime import Engine
from .runtime.timing import StageClock

app = typer.Typer(add_completion=False)
KERNELS = 25  # rows of the table

# Of a kernel's name (on a CPU an operator's) -> what kind of work it does; the first that is found.
KINDS: dict[str, re.Pattern[str]] = {
    "attention": re.compile(r"attention|sdpa|fmha|flash_|flash::|resident_kernel|^forward_kernel", re.I),
    "convolutions": re.compile(r"conv(?!ert)|fprop|implicit|head_taps_kernel", re.I),
    "products": re.compile(r"nvjet|gemm|gemv|cutlass|xmma|splitk|_scaled_mm|linear|matmul|[:d]b?mm$", re.I),
}
OTHER = "other"
NO_FLOORS = "floor: measured on a CUDA device only; of a CPU nothing is claimed"
FLOORS = "floor, ms: the stage's products, attention and convolutions alone"
MOVED = "GB/s: of what a stage cannot avoid to read and write"
COUNTED = (
    "TFLOP: of a stage, what the published form asks for; of a kind, what ran, without the audio encoder's"
)
KIND_OF_WORK = {work.Attention: "attention", work.Convolution: "convolutions", work.Gemm: "products"}


@app.command()
def command(
    out: Annotated[Path, typer.Option(help="The Chrome trace; open it in ui.perfetto.dev.")] = Path(
        "trace.json"
    ),
    checkpoint: Annotated[
        str, typer.Option(help='A model folder, "embedded", or "random" for the 14B sizes (needs a GPU).')
    ] = "embedded",
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH, divisible by 16. Default: the model's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    precision: Annotated[str | None, typer.Option(help=f"{PRECISION_HELP} Default: by device.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
) -> None:
    """Trace one chunk, and show its time by stage, by kind of work and by kernel; on a GPU beside the
    stages' floors."""
    height, width, chosen = check_settings(size, steps, precision)
    check_device_name(device)
    check_output(out, "--out")
    check_device(device)
    if checkpoint == "random":
        model = published_model(device, height, width)
    else:
        model = load(checkpoint, device, None if chosen is None else dtype_of(chosen))
    engine = Engine(model, steps, chosen, height, width)
    made = profile_chunk(engine, out)
    engine.close()  # its graphs' memory is needed
    show(table(beside_floors(made, engine, Baselines())))
    say(f"{out}: the trace; open it in ui.perfetto.dev")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a chunk: `dit` is all its steps."""

    name: str
    ms: float
    flop: int | None  # None: negligible, or not known
    bytes_moved: int | None  # at least; None: not what limits it
    floor_ms: float | None = None  # of the same work; None: not measured


@dataclasses.dataclass(frozen=True)
class Kind:
    """All kernels of one kind of work."""

    name: str
    ms: float
    flop: int | None  # None: not counted


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Every launch of one kernel (on a CPU: every call of one operator, without what it calls)."""

    name: str
    calls: int
    ms: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Of one chunk."""

    title: str
    stages: tuple[Stage, ...]
    kinds: tuple[Kind, ...]
    kernels: tuple[Kernel, ...]  # the longest first


class TracedClock(StageClock):
    """A stage clock whose stages are ranges of the trace."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with record_function(f"chunk/{name}"), super().stage(name):
            yield


def profile_chunk(engine: Engine, trace: Path) -> Profile:
    """Make two chunks of random sound, the second under the profiler, and write its Chrome trace to `trace`.

    Raises OutputError where the trace cannot be written.
    """
    model, stream, device = engine.model, engine.model.stream, engine.device
    config = model.dit.config
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device)

    # Below the session, so that any model can be profiled without a picture of its world.
    image = torch.rand(1, 3, 1, engine.height, engine.width, generator=draw).to(device) * 2 - 1
    text = normal(1, min(PROMPT_TOKENS, config.text_len), config.text_dim)
    with torch.inference_mode():
        features = model.image_encoder(image)
        constants = engine.constants(image, text, features)
    motion = constants.first_motion.float()
    sound = np.random.default_rng(0).normal(0, 0.1, round(stream.ring_s * stream.sample_rate_hz))
    ring = torch.from_numpy(sound.astype(np.float32)).to(device)

    def chunk(clock: StageClock) -> None:
        with clock.stage("audio"):
            windows = engine.audio_features(ring)
        made = engine.run_chunk(
            constants, motion, windows, lambda: normal(*engine.latent_shape()), lambda: False, clock
        )
        assert made is not None

    chunk(StageClock(device))  # captures
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        activities.append(ProfilerActivity.CUDA)
    with torch_profile(activities=activities) as profiler:
        clock = TracedClock(device)
        chunk(clock)
        timings_ms = clock.timings_ms()  # waits for the last stage
    # torch's exporter renames a file of its own over what is there, and only logs that it could not write.
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, f"trace.json{'.gz' if trace.suffix == '.gz' else ''}")
            profiler.export_chrome_trace(str(made))
            shutil.copyfile(made, trace)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"trace {trace} cannot be written: {error}") from error
    title = f"{engine.height} x {engine.width}, {engine.steps} steps, {engine.precision}, on {device}"
    kernels = kernels_of(profiler, device)
    flop = flop_of_kinds(engine, text.shape[1], features.shape[1])
    return Profile(title, stages_of(engine, timings_ms), kinds_of(kernels, flop), kernels)


def engine_stream(engine: Engine) -> StreamConfig:
    """The model's, at the engine's size."""
    return dataclasses.replace(engine.model.stream, height=engine.height, width=engine.width)


def beside_floors(profile: Profile, engine: Engine, baselines: Baselines) -> Profile:
    """`profile` with the floors of its stages, measured now (`Baselines.floors`); as it is on a CPU."""
    if engine.device.type != "cuda":
        return profile
    floor_ms = baselines.floors(engine.model, engine_stream(engine), engine.precision)
    of_stage = {name.removesuffix("_ms"): ms for name, ms in floor_ms.items()}
    of_stage["dit"] = engine.steps * of_stage.pop("dit_step")
    stages = tuple(dataclasses.replace(stage, floor_ms=of_stage.get(stage.name)) for stage in profile.stages)
    return dataclasses.replace(profile, stages=stages)


def stages_of(engine: Engine, timings_ms: dict[str, float]) -> tuple[Stage, ...]:
    """The stages in order, with the work that they ask for."""
    model = engine.model
    stream = engine_stream(engine)
    flop = {
        "dit": engine.steps * work.total_flop(work.dit_step(model.dit.config, stream)),
        "vae_decode": work.total_flop(work.vae_decode(model.vae.config, stream)),
        "vae_encode": work.total_flop(work.vae_encode(model.vae.config, stream)),
    }
    weights_bytes = sum(parameter.nbytes for parameter in model.dit.blocks.parameters())
    moved = {"color": work.color_bytes(stream), "dit": engine.steps * weights_bytes}
    names = ("audio", "dit", "vae_decode", "color", "vae_encode")
    return tuple(Stage(name, timings_ms[name], flop.get(name), moved.get(name)) for name in names)


def flop_of_kinds(engine: Engine, text_tokens: int, image_tokens: int) -> dict[str, int]:
    """Operations of a chunk by KINDS, in the form that runs; those of the audio encoder are not known.

    The VAE's attention, a thousandth of all, counts as attention, though two products do it on a GPU.
    """
    dit, vae, stream = engine.model.dit.config, engine.model.vae.config, engine_stream(engine)
    form = audio_form(dit, stream, engine.device)
    seen = min(text_tokens + 1, dit.text_len)  # one key stands for the padding
    step = [
        *work.dit_main_linears(dit, stream),
        *work.dit_audio_linears(dit, stream, form),
        *work.dit_self_attention(dit, stream),
        *work.dit_dual_attention(dit, stream, seen, image_tokens),
        *(work.dit_audio_attention(dit, stream) if form == "plain" else ()),
    ]
    flop = dict.fromkeys(KINDS, 0)
    drawn = work.vae_decode(vae, stream, folded=True) + work.vae_encode(vae, stream)
    for item in step * engine.steps + drawn:
        flop[KIND_OF_WORK[type(item)]] += item.flop
    return flop


def kind_of(kernel: str) -> str:
    """One of KINDS by the kernel's name, or OTHER."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), OTHER)


def kinds_of(kernels: Iterable[Kernel], flop: Mapping[str, int]) -> tuple[Kind, ...]:
    """The kernels' time by kind, the longest first, with its operations where `flop` has them."""
    times_ms = dict.fromkeys((*KINDS, OTHER), 0.0)
    for kernel in kernels:
        times_ms[kind_of(kernel.name)] += kernel.ms
    kinds = [Kind(name, ms, flop.get(name)) for name, ms in times_ms.items()]
    return tuple(sorted(kinds, key=lambda kind: -kind.ms))


def kernels_of(profiler: torch_profile, device: torch.device) -> tuple[Kernel, ...]:
    """What ran on the device, summed by name, the longest first; on a CPU the operators."""
    kernels = []
    for event in profiler.key_averages():
        on_gpu = event.device_type.name == "CUDA"
        if on_gpu != (device.type == "cuda") or event.key.startswith(("chunk/", "ProfilerStep")):
            continue
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append(Kernel(event.key, event.count, own_us / 1e3))
    return tuple(sorted(kernels, key=lambda kernel: -kernel.ms))


def table(profile: Profile) -> RenderableType:
    """Time by stage with achieved rates and floors, by kind of work, and the longest kernels."""
    total_ms = sum(stage.ms for stage in profile.stages)
    unmeasured = all(stage.floor_ms is None for stage in profile.stages)
    stages = Table(
        *("stage", "ms", "%", "floor", "ratio", "TFLOP", "TFLOP/s", "GB/s"),
        title=profile.title,
        caption=f"{NO_FLOORS if unmeasured else FLOORS}\n{MOVED}",
    )
    stages.columns[0].no_wrap = True
    for stage in profile.stages:
        stages.add_row(
            stage.name.replace("_", " "),
            f"{stage.ms:.2f}",
            f"{100 * stage.ms / total_ms:.1f}",
            "-" if stage.floor_ms is None else f"{stage.floor_ms:.2f}",
            "-" if stage.floor_ms is None else f"{stage.ms / stage.floor_ms:.2f}",
            *_rate(stage.flop, stage.ms),
            "-" if stage.bytes_moved is None else f"{stage.bytes_moved / stage.ms / 1e6:.4g}",
        )
    busy_ms = sum(kernel.ms for kernel in profile.kernels)
    if busy_ms == 0:
        return Group(stages, "The profiler saw no kernel: may this process read the GPU's counters (CUPTI)?")
    kinds = Table(
        "kind", "ms", "%", "TFLOP", "TFLOP/s", title="Kernels by kind, as their names tell", caption=COUNTED
    )
    for kind in profile.kinds:
        share = f"{100 * kind.ms / busy_ms:.1f}"
        kinds.add_row(kind.name, f"{kind.ms:.2f}", share, *_rate(kind.flop, kind.ms))
    kernels = Table(
        "kernel", "calls", "ms", "%", title=f"{KERNELS} longest of {len(profile.kernels)} kernels"
    )
    for kernel in profile.kernels[:KERNELS]:
        row = (str(kernel.calls), f"{kernel.ms:.3f}", f"{100 * kernel.ms / busy_ms:.1f}")
        kernels.add_row(kernel.name, *row)
    return Group(stages, kinds, kernels)


def _rate(flop: int | None, ms: float) -> tuple[str, str]:
    """TFLOP, and TFLOP a second; "-" for what is not counted, or took no time."""
    if flop is None:
        return "-", "-"
    return f"{flop / 1e12:.4g}", "-" if ms == 0 else f"{flop / ms / 1e9:.4g}"

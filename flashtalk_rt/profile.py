"""`flashtalk profile`: one chunk under torch's profiler: a trace, and its time by stage and by kernel.

Operations are counted from the configs (`profiles.work`) and bytes from the weights and frames that a stage
cannot avoid touching, so the rates are what the work asked for over the time it took, whatever was launched.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
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

from .bench.models import PROMPT_TOKENS, published_model
from .cli import show
from .errors import OutputError
from .files import check_output
from .modules.weights import load
from .options import PRECISION_HELP, check_device, check_device_name, check_settings, dtype_of
from .profiles import work
from .runtime import Engine
from .runtime.timing import StageClock

app = typer.Typer(add_completion=False)
KERNELS = 25  # rows of the table


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
    """Trace one chunk, and show its time by stage and by kernel."""
    height, width, chosen = check_settings(size, steps, precision)
    check_device_name(device)
    check_output(out, "--out")
    check_device(device)
    if checkpoint == "random":
        model = published_model(device, height, width)
    else:
        model = load(checkpoint, device, None if chosen is None else dtype_of(chosen))
    show(table(profile_chunk(Engine(model, steps, chosen, height, width), out)))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a chunk: `dit` is all its steps."""

    name: str
    ms: float
    flop: int | None  # None: negligible, or not known
    bytes_moved: int | None  # at least; None: not what limits it


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
        constants = engine.constants(image, text, model.image_encoder(image))
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
    return Profile(title, stages_of(engine, timings_ms), kernels_of(profiler, device))


def stages_of(engine: Engine, timings_ms: dict[str, float]) -> tuple[Stage, ...]:
    """The stages in order, with the work that they ask for."""
    model = engine.model
    stream = dataclasses.replace(model.stream, height=engine.height, width=engine.width)
    flop = {
        "dit": engine.steps * work.total_flop(work.dit_step(model.dit.config, stream)),
        "vae_decode": work.total_flop(work.vae_decode(model.vae.config, stream)),
        "vae_encode": work.total_flop(work.vae_encode(model.vae.config, stream)),
    }
    weights_bytes = sum(parameter.nbytes for parameter in model.dit.blocks.parameters())
    moved = {"color": work.color_bytes(stream), "dit": engine.steps * weights_bytes}
    names = ("audio", "dit", "vae_decode", "color", "vae_encode")
    return tuple(Stage(name, timings_ms[name], flop.get(name), moved.get(name)) for name in names)


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
    """Time by stage with achieved rates, and the longest kernels."""
    total_ms = sum(stage.ms for stage in profile.stages)
    stages = Table("stage", "ms", "%", "TFLOP", "TFLOP/s", "GB/s, at least", title=profile.title)
    for stage in profile.stages:
        stages.add_row(
            stage.name.replace("_", " "),
            f"{stage.ms:.2f}",
            f"{100 * stage.ms / total_ms:.1f}",
            "-" if stage.flop is None else f"{stage.flop / 1e12:.4g}",
            "-" if stage.flop is None else f"{stage.flop / stage.ms / 1e9:.4g}",
            "-" if stage.bytes_moved is None else f"{stage.bytes_moved / stage.ms / 1e6:.4g}",
        )
    busy_ms = sum(kernel.ms for kernel in profile.kernels)
    kernels = Table(
        "kernel", "calls", "ms", "%", title=f"{KERNELS} longest of {len(profile.kernels)} kernels"
    )
    for kernel in profile.kernels[:KERNELS]:
        row = (str(kernel.calls), f"{kernel.ms:.3f}", f"{100 * kernel.ms / busy_ms:.1f}")
        kernels.add_row(kernel.name, *row)
    return Group(stages, kernels)

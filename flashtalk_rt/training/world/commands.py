"""`flashtalk train world-*`: the commands that make the embedded model.

They share one run folder: `world-vae` writes vae.safetensors there, `world-probe` probe.safetensors,
`world-base` base.safetensors, `world-stage1` stage1.safetensors, each with a log-*.json beside it.
Run a command again with the same folder and it goes on where it stopped; `world-probe`, a minute or two on a
GPU, begins anew.
"""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train the embedded talking-face model.")

Run = Annotated[Path, typer.Option("--run", help="Folder of the run.")]
Device = Annotated[str, typer.Option(help="Where it runs: cuda or cpu.")]
Seed = Annotated[int, typer.Option(help="Seed of what is drawn.")]
Batch = Annotated[int, typer.Option(min=1, help="Clips a step.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
Clips = Annotated[int, typer.Option(min=64, help="Encoded clips alive; 500 steps renew a quarter.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Source = Annotated[Path | None, typer.Option(help="Weights to start from instead of the default.")]


def _start(run: Path, device: str, seed: int) -> Any:
    """Make the folder; a seeded generator on the device."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device is {device}, but torch sees no CUDA device; use --device cpu")
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    return torch.Generator(device).manual_seed(seed)


def _record(
    run: Path, name: str, device: Any, settings: dict[str, Any], history: list[dict[str, float]]
) -> None:
    """The command's log: settings, machine, commit and history as JSON."""
    from ...profiles.record import environment, write_result

    record = {"command": name, **environment(device), **settings, "history": history}
    write_result(run / f"log-{name.removeprefix('world-')}.json", record)


def _log(line: str) -> None:
    typer.echo(line)


@app.command("world-vae")
def world_vae(
    run: Run,
    steps: Steps = 20000,
    batch: Batch = 3,
    lr: Rate = 1e-3,
    source: Source = None,
    frames: Annotated[
        int, typer.Option(min=5, help="Of a clip, 1 + 4 n; end on 33: on shorter clips, longer ones drift.")
    ] = 33,
    restless: Annotated[
        float, typer.Option(min=0, max=1, help="Share of clips with a new mouth in every frame.")
    ] = 0.0,
    device: Device = "cuda",
    seed: Seed = 0,
) -> None:
    """Train the tiny VAE on random clips."""
    if frames % 4 != 1:
        raise InputError(f"--frames is {frames}; it must be 1 + 4 n")
    generator = _start(run, device, seed)
    from ..loop import FitConfig
    from .fit_vae import fit_vae, impulse_response
    from .nets import TOY_STREAM, TOY_VAE, load_vae, save_net

    fit = FitConfig(steps=steps, peak_lr=lr)
    size = (TOY_STREAM.height, TOY_STREAM.width)
    start = load_vae(source, generator.device) if source else None
    vae, history = fit_vae(
        TOY_VAE, start, fit, batch, size, run / "vae.ckpt", generator, _log, frames=frames, restless=restless
    )
    save_net(vae, run / "vae.safetensors")
    response = impulse_response(vae, size, generator)
    _log(f"a frame's own mouth comes back, by the four frames of a latent frame: {response}")
    settings = {
        "steps": steps,
        "batch": batch,
        "peak_lr": lr,
        "seed": seed,
        "source": str(source or ""),
        "frames": frames,
        "restless": restless,
        "impulse_response": response,
    }
    _record(run, "world-vae", generator.device, settings, history)


@app.command("world-probe")
def world_probe(
    run: Run, steps: Steps = 3000, batch: Batch = 256, device: Device = "cuda", seed: Seed = 1
) -> None:
    """Train the probe that measures faces, on renders and VAE reconstructions only."""
    generator = _start(run, device, seed)
    import torch

    from ... import ops
    from ...modules.precision import autocast
    from .nets import TOY_STREAM, load_vae
    from .probe import Probe, probe_scores, random_sample, save_probe, train_probe

    vae = load_vae(run / "vae.safetensors", generator.device)
    size = TOY_STREAM.height

    def reconstruct_half(frames: torch.Tensor) -> torch.Tensor:
        half = len(frames) // 2
        with ops.plain_backends(), autocast(frames.device):
            rebuilt = vae.decode(vae.encode(frames[:half, :, None]))[:, :, 0].float().clamp(-1, 1)
        return torch.cat((rebuilt, frames[half:]))

    probe = Probe().to(generator.device)
    started = time.perf_counter()
    losses = train_probe(
        probe, lambda: random_sample(batch, size, generator), steps, augment=reconstruct_half,
        on_step=lambda step, loss: _log(f"step {step}/{steps}  loss {loss:.4f}") if step % 500 == 0 else None,
    )  # fmt: skip
    save_probe(probe, run / "probe.safetensors")
    test = random_sample(2048, size, generator, held_out=True)
    scores = probe_scores(probe, test.identity, test.motion[:, None], test.frames[:, None])
    _log(json.dumps(scores))
    history = [{"step": float(i), "loss": losses[i]} for i in range(0, len(losses), 50)]
    settings = {"steps": steps, "batch": batch, "seed": seed, "seconds": time.perf_counter() - started}
    _record(run, "world-probe", generator.device, settings | {"held_out_r2": scores}, history)


def _fit_dit(
    name: str,
    run: Path,
    source: Path | None,
    steps: int,
    batch: int,
    clips: int,
    lr: float,
    device: str,
    seed: int,
) -> None:
    generator = _start(run, device, seed)
    from ...modules.dit import DiT
    from ..loop import FitConfig
    from .fit_dit import BASE_KINDS, STAGE1_KINDS, fit_dit
    from .nets import TOY_DIT, TOY_STREAM, load_dit, load_vae, save_net

    vae = load_vae(run / "vae.safetensors", generator.device)
    dit = load_dit(source, generator.device) if source else DiT(TOY_DIT).to(generator.device)
    history = fit_dit(
        dit,
        vae,
        STAGE1_KINDS if name == "stage1" else BASE_KINDS,
        # An average over the last tenth of a short run, and over the last thousand steps of a long one.
        FitConfig(steps=steps, peak_lr=lr, ema=min(0.999, 1 - 10 / max(steps, 20))),
        batch,
        clips=clips,
        speakers=min(256, max(4, clips // 24)),
        renew_every=500,
        stream=TOY_STREAM,
        checkpoint=run / f"{name}.ckpt",
        generator=generator,
        log=_log,
    )
    save_net(dit, run / f"{name}.safetensors")
    settings = {
        "steps": steps,
        "batch": batch,
        "clips": clips,
        "peak_lr": lr,
        "seed": seed,
        "source": str(source or ""),
    }
    _record(run, f"world-{name}", generator.device, settings, history)


@app.command("world-base")
def world_base(
    run: Run,
    steps: Steps = 12000,
    batch: Batch = 128,
    clips: Clips = 6144,
    lr: Rate = 1e-3,
    source: Source = None,
    device: Device = "cuda",
    seed: Seed = 2,
) -> None:
    """Train the tiny DiT by flow matching, from random weights unless --source is given."""
    _fit_dit("base", run, source, steps, batch, clips, lr, device, seed)


@app.command("world-stage1")
def world_stage1(
    run: Run,
    steps: Steps = 3000,
    batch: Batch = 128,
    clips: Clips = 6144,
    lr: Rate = 4e-4,
    source: Source = None,
    device: Device = "cuda",
    seed: Seed = 3,
) -> None:
    """Adapt the base model to streaming: references from elsewhere, re-encoded pasts, all shapes."""
    _fit_dit("stage1", run, source or run / "base.safetensors", steps, batch, clips, lr, device, seed)


@app.command("world-voices")
def world_voices(out: Path) -> None:
    """Speak the test's held-out voices with espeak-ng into one safetensors file."""
    from .voices import write_voices

    write_voices(out)
    _log(f"wrote {out}")


@app.command("world-export")
def world_export(run: Run, out: Path) -> None:
    """Write the run as a model folder with its card: what ships as flashtalk_rt/embedded."""
    from .export import export_model

    export_model(run, out)
    _log(f"wrote {out}")


@app.command("world-eval")
def world_eval(
    run: Run,
    voices: Annotated[Path, typer.Option(help="What `world-voices` wrote.")],
    net: Annotated[str, typer.Option(help="Which DiT of the run: stage1 or base.")] = "stage1",
    chunks: Annotated[int, typer.Option(min=13, help="Of each clip; drift needs 13.")] = 20,
    identities: Annotated[int, typer.Option(min=2, help="Held-out faces, a clip each.")] = 64,
    steps: Annotated[
        str, typer.Option(help="Denoising steps, comma-separated; the last one also gets swapped audio.")
    ] = "4,24,40,8",
    device: Device = "cuda",
    seed: Seed = 4,
) -> None:
    """Measure the model on held-out identities and voices; writes eval-*.json."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", steps):
        raise InputError(f"--steps is {steps!r}; give numbers of steps, comma-separated, such as 4,24,8")
    generator = _start(run, device, seed)
    import torch

    from ...modules.precision import native_bf16
    from ...profiles.record import environment, write_result
    from .evaluate import evaluate, make_test_set, vae_psnr_db
    from .nets import TOY_STREAM, load_dit, load_vae
    from .probe import load_probe
    from .voices import read_voices

    where = generator.device
    # In the precision that a session takes by default.
    dtype = torch.bfloat16 if native_bf16(where) else torch.float32
    vae = load_vae(run / "vae.safetensors", where).to(dtype)
    probe = load_probe(run / "probe.safetensors", where)
    dit = load_dit(run / f"{net}.safetensors", where)
    dit.prepare(dtype, fp8=False)
    test = make_test_set(read_voices(voices), identities, chunks, TOY_STREAM, generator)
    rows = evaluate(dit, vae, probe, test, tuple(int(s) for s in steps.split(",")), generator, _log)
    record = {
        **environment(where),
        "net": net,
        "precision": str(dtype).removeprefix("torch."),
        "shift": TOY_STREAM.shift,
        "audio_guidance": TOY_STREAM.audio_guidance,
        "guided_below": TOY_STREAM.guided_below,
        "identities": identities,
        "chunks": chunks,
        "seed": seed,
        "vae_psnr_db": vae_psnr_db(vae, test),
        # JSON has no infinity, which a motion ratio can be where nothing moves between the joins.
        "rows": {
            name: {key: value if math.isfinite(value) else None for key, value in row.items()}
            for name, row in rows.items()
        },
    }
    write_result(run / f"eval-{net}.json", record)

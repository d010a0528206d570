"""Write a finished run as the embedded model: one converted folder and its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ...modules.convert import save_converted
from ...modules.model import Model
from ...modules.toy_encoders import MelAudioEncoder, NullTextEncoder, PatchImageEncoder
from ...modules.vae import VAE
from . import metrics
from .nets import TOY_STREAM, load_dit, load_vae
from .probe import random_sample

PORTRAIT_MARGIN_DB = 3.0
COLUMNS = {
    "lip_sync_r": "lip sync r (lag 0)",
    "lip_sync_r_ci_low": "from",
    "lip_sync_r_ci_high": "to",
    "lip_sync_r_worst": "worst clip",
    "cavity_r": "r by colour, no network",
    "lag_within_1": "clips with best lag within 1 frame",
    "shuffled_r": "r to another clip's speech",
    "pose_variance_ratio": "pose variance / truth",
    "blink_variance_ratio": "blink variance / truth",
    "gaze_variance_ratio": "gaze variance / truth",
    "mouth_variance_ratio": "mouth variance / truth",
    "identity_error": "identity error",
    "identity_drift": "identity drift",
    "identity_slope_per_chunk": "identity error's slope a chunk",
    "residual_psnr_db": "residual PSNR, dB",
    "collapsed": "collapsed clips",
    "boundary_ratio": "motion at joins / elsewhere",
    "frechet": "Fréchet",
}


@torch.no_grad()
def portrait_floor_db(vae: VAE, generator: torch.Generator, portraits: int = 256) -> float:
    """The worst reconstruction PSNR of held-out portraits, less a margin.

    Photographs measured 15 to 19 dB where portraits measured 26 and more, so the margin decides
    nothing between the two; it is there for portraits that were drawn, scaled or compressed elsewhere.
    """
    worst = float("inf")
    for _ in range(0, portraits, 32):
        frames = random_sample(32, TOY_STREAM.height, generator, held_out=True).frames[:, :, None]
        rebuilt = vae.decode(vae.encode(frames)).float()
        worst = min(worst, metrics.psnr(rebuilt, frames, keep_dims=1).min().item())
    return worst - PORTRAIT_MARGIN_DB


def read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; run the training command that writes it first")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def export_model(run: Path, out: Path) -> None:
    """Write the run's VAE and stage-1 DiT, in bfloat16, and MODEL_CARD.md as the new folder `out`."""
    logs = {name: read_record(run / f"log-{name}.json") for name in ("vae", "probe", "stage1")}
    logs |= {
        name: read_record(path)
        for path in sorted(run.glob("log-*.json"))
        if (name := path.stem[4:]) not in logs
    }
    evaluation = read_record(run / "eval-stage1.json")
    where = torch.device("cpu")
    vae = load_vae(run / "vae.safetensors", where)
    dit = load_dit(run / "stage1.safetensors", where)
    model = Model(
        dit=dit,
        vae=vae,
        audio_encoder=MelAudioEncoder(TOY_STREAM.sample_rate_hz, TOY_STREAM.fps),
        image_encoder=PatchImageEncoder(),
        text_encoder=NullTextEncoder(dit.config.text_dim),
        stream=TOY_STREAM,
        label="toy model",
        min_portrait_psnr_db=portrait_floor_db(vae, torch.Generator().manual_seed(0)),
    )
    save_converted(model, out, torch.bfloat16)
    notes = run / "NOTES.md"
    history = notes.read_text() if notes.is_file() else ""
    (out / "MODEL_CARD.md").write_text(card(logs, evaluation, model, history))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def card(logs: dict[str, dict[str, Any]], evaluation: dict[str, Any], model: Model, notes: str) -> str:
    """The model card: what it is, how it was trained, and every metric with its control rows.

    `notes`: what the logs do not say, from NOTES.md in the run's folder.
    """
    parameters = {
        name: sum(p.numel() for p in net.parameters()) / 1e6
        for name, net in (("VAE", model.vae), ("DiT", model.dit))
    }
    training = []
    for name, log in logs.items():
        last = log["history"][-1]
        seconds = last.get("seconds", log.get("seconds", 0))
        training.append(
            f"| {name} | {log['steps']} | {log['batch']} | {log.get('peak_lr', '-')} | {log['device']} | "
            f"{seconds:.0f} | {last['loss']:.4f} | {log.get('source') or '-'} |"
        )
    rows = [
        f"| {name} | " + " | ".join(number(row[key]) for key in COLUMNS) + " |"
        for name, row in evaluation["rows"].items()
    ]
    probe = logs["probe"]["held_out_r2"]
    return "\n".join(
        [
            "# The embedded toy model",
            "",
            "A tiny talking-face model of the same classes as the 14B one "
            f"(VAE {parameters['VAE']:.1f} M parameters, DiT {parameters['DiT']:.1f} M), trained from random "
            "weights on a procedural world of cartoon faces and synthetic speech. It knows no photographs "
            "and no language: photographs are refused, prompts have no effect. It is not distilled: the "
            f"default is {model.stream.steps} denoising steps.",
            "",
            "## Training",
            "",
            "Each command of `flashtalk train` in turn; the logs are in `profiles/results/world-*.json`.",
            "",
            "| command | steps | clips a step | peak rate | device | seconds | last loss | started from |",
            "|---|---|---|---|---|---|---|---|",
            *training,
            "",
            notes.strip(),
            "",
            "## Metrics",
            "",
            f"Net `{evaluation['net']}`, {evaluation['identities']} held-out identities speaking held-out "
            f"espeak-ng voices, {evaluation['chunks']} chunks of 28 frames each. The VAE reconstructs the "
            f"true frames to {evaluation['vae_psnr_db']:.1f} dB. The probe (trained on renders and VAE "
            f"reconstructions only) reads held-out renders with R2 {probe['mouth_open']:.3f} for the mouth's "
            f"opening and {probe['identity_mean']:.3f} for identity; its opening correlates with the "
            f"cavity's measured height at r = {probe['mouth_open_cavity_r']:.3f}.",
            "",
            "Lip sync r is a mean over clips, with its 95 % bootstrap interval; the other columns have none.",
            "",
            "| row | " + " | ".join(COLUMNS.values()) + " |",
            "|---" * (len(COLUMNS) + 1) + "|",
            *rows,
            "",
            "The targets of this stage: lip sync r at least 0.9 within one frame, r to another clip's speech "
            "at most 0.1, pose and blink variance 0.5 to 1.5 of the truth, nothing collapsed in 20 chunks.",
            "",
        ]
    )

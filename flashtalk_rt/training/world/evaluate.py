"""How well the toy talks: every metric of the model card, beside the rows it must be read against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...config import StreamConfig
from ...errors import InputError
from ...modules.audio import normalize_loudness
from ...modules.dit import DiT
from ...modules.toy_encoders import PatchImageEncoder
from ...modules.vae import VAE
from ..rollout import rollout
from . import metrics
from .data import MOUTH
from .face import MOTION_NAMES, cavity_height, render, sample_identities
from .motion import sample_motion
from .probe import Probe, read_frames
from .speech import mouth_truth

POSE = slice(0, 5)
BLINK = MOTION_NAMES.index("blink")
GAZE = slice(BLINK + 1, BLINK + 3)
OPEN = MOTION_NAMES.index("mouth_open")
TRAJECTORY_FRAMES = 7  # of a Fréchet sample: a quarter of a chunk
Row = dict[str, float]
Frames = Iterator[Tensor]  # a chunk's frames at a time, [N, 3, T, H, W] in [-1, 1]


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Held-out identities that speak held-out voices."""

    __test__ = False  # not a pytest class

    identity: Tensor  # [N, 12]
    samples: Tensor  # [N, chunks * chunk_samples]
    motion: Tensor  # [N, chunks * new_frames, 10], the truth
    image: Tensor  # [N, 3, 1, H, W], each identity in another pose
    stream: StreamConfig

    @property
    def chunks(self) -> int:
        return self.samples.shape[1] // self.stream.chunk_samples


def make_test_set(
    voices: Tensor, identities: int, chunks: int, stream: StreamConfig, generator: torch.Generator
) -> TestSet:
    """`voices` [V, S] float32: recordings, cut to `chunks` chunks and shared out over identities.  InputError
    where they are shorter."""
    most = voices.shape[1] // stream.chunk_samples
    if chunks > most:
        raise InputError(f"chunks is {chunks}, but the voices last {most}; ask for fewer")
    device = generator.device
    identity = sample_identities(identities, generator, held_out=True).to(device)
    # Of many voices, by an odd stride: neighbours, which stand in for each other, then speak different texts.
    rows = torch.arange(identities) * (len(voices) // identities | 1) % len(voices)
    samples = voices[rows, : chunks * stream.chunk_samples].to(device)
    loud = normalize_loudness(samples, stream.sample_rate_hz, stream.loudness_lufs)
    frames = chunks * stream.new_frames
    motion = sample_motion(identities, frames, generator, device)
    motion[..., MOUTH] = mouth_truth(loud, stream.sample_rate_hz, stream.fps)
    pose = sample_motion(identities, 1, generator, device)
    image = render(identity, pose, stream.height, stream.width).transpose(1, 2)
    return TestSet(identity, samples, motion, image, stream)


def true_frames(test: TestSet) -> Frames:
    for motion in test.motion.split(test.stream.new_frames, dim=1):
        yield render(test.identity, motion, test.stream.height, test.stream.width).transpose(1, 2)


def reconstructed_frames(test: TestSet, vae: VAE) -> Frames:
    """The truth through the VAE, four frames short of a multiple made up by repetition."""
    for frames in true_frames(test):
        padded = torch.cat((frames[:, :, :1].expand(-1, -1, 5, -1, -1), frames), dim=2)
        with torch.no_grad():
            yield vae.decode(vae.encode(padded)).float().clamp(-1, 1)[:, :, 5:]


def static_frames(test: TestSet) -> Frames:
    for _ in range(test.chunks):
        yield test.image.expand(-1, -1, test.stream.new_frames, -1, -1)


def repeated_frames(test: TestSet) -> Frames:
    """Each chunk holds the truth's last frame of the chunk before."""
    last = test.image
    for frames in true_frames(test):
        yield last.expand_as(frames)
        last = frames[:, :, -1:]


def generated_frames(
    test: TestSet, dit: DiT, vae: VAE, steps: int, generator: torch.Generator, samples: Tensor | None = None
) -> Frames:
    """The model's answer to the test's audio, or to other `samples` with image and seed unchanged."""
    features = PatchImageEncoder()(test.image)
    spoken = test.samples if samples is None else samples
    yield from rollout(dit, vae, test.image, features, spoken, test.stream, steps, generator)


@dataclasses.dataclass(frozen=True)
class Observed:
    """What the probe and the renderer say of one row's frames."""

    motion: Tensor  # [N, F, 10]
    identity_error: Tensor  # [N, chunks]
    residual_db: Tensor  # [N, chunks]
    cavity: Tensor  # [N, F]
    pixel_change: Tensor  # [N, F - 1] `metrics.frame_change` of the pictures
    finite: bool


def observe(test: TestSet, probe: Probe, frames: Frames) -> Observed:
    motion, errors, residuals, cavity, change = [], [], [], [], []
    last: Tensor | None = None
    finite = True
    for chunk in frames:
        video = chunk.transpose(1, 2)
        finite = finite and bool(video.isfinite().all())
        reading = read_frames(probe, video)
        motion.append(reading.motion)
        errors.append((reading.identity - test.identity[:, None]).abs().mean((1, 2)))
        # The identity is known: what the renderer cannot explain with it is an artefact.
        rendered = render(test.identity, reading.motion, test.stream.height, test.stream.width)
        residuals.append(metrics.residual_psnr(rendered, video))
        cavity.append(cavity_height(video))
        joined = video if last is None else torch.cat((last, video), dim=1)
        change.append(metrics.frame_change(joined, time_dim=1))
        last = video[:, -1:]
    return Observed(
        torch.cat(motion, 1),
        torch.stack(errors, 1),
        torch.stack(residuals, 1).double(),
        torch.cat(cavity, 1),
        torch.cat(change, 1),
        finite,
    )


def trajectories(motion: Tensor) -> Tensor:
    """[N, F, 10] -> Fréchet samples [M, TRAJECTORY_FRAMES * 10]."""
    return motion.unfold(1, TRAJECTORY_FRAMES, TRAJECTORY_FRAMES).flatten(0, 1).flatten(1)


def score(test: TestSet, seen: Observed, truth: Observed, floor_db: float) -> Row:
    """One row of the table.  `floor_db`: the VAE reconstruction's first percentile residual."""
    true_mouth = test.motion[..., OPEN]
    sync = metrics.lip_sync(seen.motion[..., OPEN], true_mouth)
    shuffled = metrics.lip_sync(seen.motion[..., OPEN], true_mouth.roll(1, 0))
    cavity = metrics.pearson(seen.cavity, true_mouth)
    ratio = metrics.variance_ratio(seen.motion, truth.motion)
    energy = metrics.motion_energy(seen.motion, 1) / metrics.motion_energy(truth.motion, 1)
    per_chunk = energy[:, None].expand_as(seen.residual_db)
    collapsed = metrics.collapsed(seen.residual_db, floor_db, per_chunk)
    drift, slope = metrics.identity_drift(seen.identity_error)
    frames = test.stream.new_frames
    joins = range(frames, test.chunks * frames, frames)
    boundary = metrics.boundary_ratio(seen.pixel_change.mean(0)[1:], [j - 1 for j in joins][1:])
    low, high = metrics.bootstrap_interval(sync.r, torch.Generator().manual_seed(0))
    return {
        "lip_sync_r": sync.r.mean().item(),
        "lip_sync_r_ci_low": low,
        "lip_sync_r_ci_high": high,
        "lip_sync_r_worst": sync.r.min().item(),
        "lag_within_1": (sync.best_lag.abs() <= 1).double().mean().item(),
        "shuffled_r": shuffled.r.mean().item(),
        "cavity_r": cavity.mean().item(),
        "pose_variance_ratio": ratio[POSE].mean().item(),
        "gaze_variance_ratio": ratio[GAZE].mean().item(),
        "blink_variance_ratio": ratio[BLINK].item(),
        "mouth_variance_ratio": ratio[OPEN].item(),
        "identity_error": seen.identity_error.mean().item(),
        "identity_drift": drift.mean().item(),
        "identity_slope_per_chunk": slope.mean().item(),
        "residual_psnr_db": seen.residual_db.mean().item(),
        "collapsed": 1.0 if not seen.finite else collapsed.double().mean().item(),
        "boundary_ratio": boundary.mean().item(),
        "frechet": metrics.frechet(trajectories(seen.motion), trajectories(truth.motion)).item(),
    }


def evaluate(
    dit: DiT,
    vae: VAE,
    probe: Probe,
    test: TestSet,
    steps: tuple[int, ...],
    generator: torch.Generator,
    log: Callable[[str], None],
) -> dict[str, Row]:
    """The whole table: ground truth, VAE, static, repeated, and the model at each number of steps,
    the last of them also with swapped audio."""
    truth = observe(test, probe, true_frames(test))
    rebuilt = observe(test, probe, reconstructed_frames(test, vae))
    floor_db = rebuilt.residual_db.quantile(0.01).item()
    rows = {
        "ground truth": score(test, truth, truth, floor_db),
        "VAE reconstruction": score(test, rebuilt, truth, floor_db),
        "static reference": score(test, observe(test, probe, static_frames(test)), truth, floor_db),
        "last frame repeated": score(test, observe(test, probe, repeated_frames(test)), truth, floor_db),
    }
    state = generator.get_state()
    for count in steps:
        generator.set_state(state)
        seen = observe(test, probe, generated_frames(test, dit, vae, count, generator))
        rows[f"model, {count} steps"] = score(test, seen, truth, floor_db)
        log(f"{count} steps: {rows[f'model, {count} steps']}")
    generator.set_state(state)
    swapped = generated_frames(test, dit, vae, steps[-1], generator, test.samples.roll(1, 0))
    rows[f"model, {steps[-1]} steps, swapped audio"] = score(
        test, observe(test, probe, swapped), truth, floor_db
    )
    return rows


@torch.no_grad()
def vae_psnr_db(vae: VAE, test: TestSet) -> float:
    """Reconstruction PSNR over the test's true frames, mean over clips and chunks."""
    values = []
    for true, rebuilt in zip(true_frames(test), reconstructed_frames(test, vae), strict=True):
        values += [metrics.psnr(a, b) for a, b in zip(rebuilt, true, strict=True)]
    return torch.stack(values).mean().item()

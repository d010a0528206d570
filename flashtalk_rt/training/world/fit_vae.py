"""Train the toy's VAE on random clips of the world."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ... import ops
from ...config import VAEConfig
from ...modules.precision import autocast
from ...modules.vae import STRIDE, VAE
from ..loop import FitConfig, Log, fit
from .data import MOUTH, SpeechBank, talk
from .face import render, sample_identities
from .motion import FPS, sample_motion
from .speech import SAMPLE_RATE_HZ, mouth_truth

CLIP_FRAMES = 33  # a stream's chunk: trained on shorter clips, the colours of longer ones drift
KL_WEIGHT = 1e-4
MOTION_WEIGHT = 12.0  # of the pixels that move (mouth, eyes) over those that do not


def sample_video(
    bank: SpeechBank,
    count: int,
    frames: int,
    size: tuple[int, int],
    generator: torch.Generator,
    restless: float = 0.0,
) -> Tensor:
    """Random talking clips [count, 3, frames, H, W].

    `restless`: the share of clips whose mouth is drawn anew, uniformly, in every frame.  In natural motion
    a frame is nearly its neighbours' mean, and a VAE that keeps one frame of four is nearly right.
    """
    sound = bank.cut(count, frames * SAMPLE_RATE_HZ // FPS, generator)
    mouth = mouth_truth(sound, SAMPLE_RATE_HZ, FPS)
    identity = sample_identities(count, generator).to(generator.device)
    if restless:
        anew = torch.rand(mouth.shape, generator=generator, device=mouth.device)
        chosen = torch.rand(count, 1, 1, generator=generator, device=mouth.device) < restless
        mouth = torch.where(chosen, anew, mouth)
    return talk(identity, mouth, generator, *size)


def vae_loss(vae: VAE, video: Tensor, noise: Tensor) -> Tensor:
    """L1 + L2 reconstruction, weighted to what moves, and a light pull to a unit Gaussian.

    video [B, 3, T, H, W]; noise: standard normal of the latent's shape.
    """
    step = video.shape[2] - 1  # all at once
    mean, logvar = vae.encode_distribution(video, step)
    logvar = logvar.float().clamp(-20, 5)
    sample = mean.float() + noise * (0.5 * logvar).exp()
    reconstruction = vae.decode(vae.normalize(sample), step // 4).float()
    error = reconstruction - video
    kl = 0.5 * (mean.float().square() + logvar.exp() - 1 - logvar).mean()
    moving = (video - video.mean(2, keepdim=True)).abs().amax(1, keepdim=True)
    weight = 1 + MOTION_WEIGHT * (4 * moving).clamp(max=1)
    return (weight * (error.abs() + error.square())).mean() + KL_WEIGHT * kl


# Inductor fuses the plain forms, forward and backward; a kernel's backward runs them one by one.
@ops.plain_backends()
def fit_vae(
    config: VAEConfig,
    source: VAE | None,
    fit_config: FitConfig,
    batch: int,
    size: tuple[int, int],
    checkpoint: Path,
    generator: torch.Generator,
    log: Log,
    *,
    frames: int = CLIP_FRAMES,
    restless: float = 0.0,
) -> tuple[VAE, list[dict[str, float]]]:
    """Train a VAE, from random weights or from `source`, on clips of `frames` (1 + 4 n); `restless` as in
    `sample_video`.

    Its latent's channel statistics are measured at the end, and its configuration then holds them.
    """
    device = generator.device
    # During training the latent is not normalised: its statistics are known only at the end.
    zeros, ones = (0.0,) * config.z_dim, (1.0,) * config.z_dim
    vae = VAE(dataclasses.replace(config, latent_mean=zeros, latent_std=ones)).to(device).channels_last()
    if source is not None:
        vae.load_state_dict(source.state_dict())
    if device.type == "cuda":
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
    bank = SpeechBank(64 if device.type == "cuda" else 4, 30.0, generator)

    def inputs_of(step: int) -> tuple[Tensor, ...]:
        video = sample_video(bank, batch, frames, size, generator, restless)
        shape = (batch, config.z_dim, (frames - 1) // 4 + 1, size[0] // STRIDE, size[1] // STRIDE)
        return video, torch.randn(shape, generator=generator, device=device)

    def loss_of(video: Tensor, noise: Tensor) -> Tensor:
        with autocast(device):
            return vae_loss(vae, video, noise)

    history = fit(vae, inputs_of, loss_of, fit_config, checkpoint, generator, log)
    mean, std = latent_statistics(vae, bank, size, generator)
    measured = VAE(dataclasses.replace(config, latent_mean=mean, latent_std=std))
    measured.load_state_dict(vae.state_dict())
    return measured.to(device).eval().requires_grad_(False).channels_last(), history


@torch.no_grad()
def latent_statistics(
    vae: VAE, bank: SpeechBank, size: tuple[int, int], generator: torch.Generator, clips: int = 256
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every latent channel over random clips."""
    parts = []
    for _ in range(0, clips, 16):
        video = sample_video(bank, 16, CLIP_FRAMES, size, generator)
        parts.append(vae.encode_distribution(video, CLIP_FRAMES - 1)[0].float())
    latent = torch.cat(parts).transpose(0, 1).flatten(1)
    return tuple(latent.mean(1).tolist()), tuple(latent.std(1).tolist())


@torch.no_grad()
def impulse_response(
    vae: VAE, size: tuple[int, int], generator: torch.Generator, faces: int = 8
) -> list[float]:
    """How much of a mouth that opens for one frame alone is there in that frame's reconstruction: one value
    for each of the four frames of a latent frame, 1 is all of it.

    Clip averages hide it: a VAE may keep the last frame of four and draw the others between its neighbours.
    """
    identity = sample_identities(faces, generator, held_out=True).to(generator.device)
    motion = sample_motion(faces, CLIP_FRAMES, generator, generator.device)
    motion[..., MOUTH] = torch.tensor((0.4, 0.2), device=generator.device)

    def both(motion: Tensor) -> tuple[Tensor, Tensor]:
        video = render(identity, motion, *size).transpose(1, 2)
        return video, vae.decode(vae.encode(video)).float()

    video, rebuilt = both(motion)
    first = CLIP_FRAMES // 2 + 1  # of a latent frame's four, in the middle of the clip
    response = []
    for frame in range(first, first + 4):
        opened = motion.clone()
        opened[:, frame, MOUTH.start] = 0.7
        with_impulse, found = both(opened)
        wanted = (with_impulse - video)[:, :, frame]
        got = (found - rebuilt)[:, :, frame]
        response.append(((got * wanted).sum() / wanted.square().sum()).item())
    return response

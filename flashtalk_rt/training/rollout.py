"""A batch of streams rolled out together, chunk after chunk, as a session does one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..config import StreamConfig
from ..modules.audio import normalize_loudness
from ..modules.chunk import Reference, denoise, reference_latent
from ..modules.dit import DiT
from ..modules.schedule import timesteps
from ..modules.toy_encoders import MelAudioEncoder
from ..modules.vae import VAE
from .stage1 import batch_windows


@torch.no_grad()
def rollout(
    dit: DiT,
    vae: VAE,
    image: Tensor,
    image_features: Tensor,
    samples: Tensor,
    stream: StreamConfig,
    steps: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Yield each chunk's new frames [B, 3, new_frames, H, W] in [-1, 1].

    image [B, 3, 1, H, W]; image_features [B, tokens, dim]; samples [B, N]: every whole chunk of it
    is spoken, through the toy's audio encoder.
    """
    batch = len(image)
    encoder = MelAudioEncoder(stream.sample_rate_hz, stream.fps)
    text = image.new_zeros(batch, 0, dit.config.text_dim)
    y = reference_latent(vae, image, stream.frames)
    reference = Reference.of(dit, text, image_features, y, stream)
    motion = vae.encode(image).float()
    statistics = ops.lab_statistics(image)
    times = timesteps(steps, stream.shift)
    shape = (batch, *reference.y[:, 4:].shape[1:])
    ring = image.new_zeros(batch, round(stream.ring_s * stream.sample_rate_hz))
    for start in range(0, samples.shape[1] - stream.chunk_samples + 1, stream.chunk_samples):
        ring = torch.cat((ring, samples[:, start : start + stream.chunk_samples]), dim=1)
        ring = ring[:, stream.chunk_samples :]
        loud = normalize_loudness(ring, stream.sample_rate_hz, stream.loudness_lufs)
        features = encoder(loud, ring.shape[1] // stream.samples_per_frame)
        windows = batch_windows(features, stream.frames, dit.config.audio_window)
        steps_done = denoise(
            dit,
            reference,
            dit.audio_context(windows),
            motion,
            times,
            stream.sampler,
            lambda: torch.randn(shape, generator=generator, device=image.device),
        )
        latent = deque(steps_done, maxlen=1).pop()
        frames = vae.decode(latent).float().clamp(-1, 1)
        frames = ops.color_match(frames, *statistics, strength=stream.color_strength)
        motion = vae.encode(frames[:, :, -stream.motion_frames :]).float()
        yield frames[:, :, stream.motion_frames :]

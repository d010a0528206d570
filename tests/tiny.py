"""Tiny random models of the real classes, for tests."""

from __future__ import annotations

import dataclasses

import torch

from flashtalk_rt.config import DiTConfig, StreamConfig, VAEConfig
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.model import Model
from flashtalk_rt.modules.toy_encoders import MelAudioEncoder, NullTextEncoder, PatchImageEncoder
from flashtalk_rt.modules.vae import VAE

DIT = DiTConfig(
    dim=48,
    ffn_dim=64,
    num_heads=2,
    num_layers=2,
    freq_dim=16,
    text_dim=8,
    text_len=4,
    image_dim=27,
    audio_blocks=4,
    audio_dim=40,
    intermediate_dim=8,
    output_dim=16,
    context_tokens=4,
)
# As small as the kernels of `csrc` serve, at 64 x 64 or more: heads of 128, the VAE's published widths, and a
# prompt's published length, which the launches depend on. The portrait has 257 tokens, as published.
DIT_WIDE = dataclasses.replace(DIT, dim=256, ffn_dim=512, text_len=512)
VAE_SMALL = VAEConfig(dim=4, num_res_blocks=1)
VAE_WIDE = VAEConfig(num_res_blocks=1)
STREAM = StreamConfig(height=64, width=48, steps=2)


def model(seed: int = 0, dit: DiTConfig = DIT, vae: VAEConfig = VAE_SMALL, **stream: object) -> Model:
    """A random `Model` with the toy's encoders; `stream` overrides StreamConfig fields."""
    torch.manual_seed(seed)
    settings = dataclasses.replace(STREAM, **stream)  # type: ignore[arg-type]
    return Model(
        dit=DiT(dit).eval(),
        vae=VAE(vae).eval(),
        audio_encoder=MelAudioEncoder(settings.sample_rate_hz, settings.fps),
        image_encoder=PatchImageEncoder(),
        text_encoder=NullTextEncoder(dit.text_dim),
        stream=settings,
    )

"""Frozen configurations, and the only place that reads the environment.

The numbers are the published system's (SoulX-FlashTalk 14B); the embedded toy overrides them in its
`flashtalk.json`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from .errors import CheckpointError

SIZE_MULTIPLE = 16  # pixels: the VAE's stride of 8 times the patch of 2

Sampler = Literal["renoise", "euler"]
Precision = Literal["fp32", "bf16", "fp8"]  # fp8: the DiT's large products

# Channel statistics of the WAN2.1 VAE's latents, as published with its weights.
WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer: WAN2.1 image-to-video with an audio branch."""

    in_dim: int = 36
    out_dim: int = 16
    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int = 1280
    eps: float = 1e-6
    audio_window: int = 5
    audio_blocks: int = 12
    audio_dim: int = 768
    intermediate_dim: int = 512
    output_dim: int = 768
    context_tokens: int = 32

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The causal 3D VAE: stride 4 in time, 8 in space."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """What a session does around the networks."""

    height: int = 768  # pixels
    width: int = 448  # pixels
    fps: int = 25
    sample_rate_hz: int = 16_000
    frames: int = 33  # decoded a chunk, the motion frames included
    motion_frames: int = 5  # carried over from the chunk before
    ring_s: float = 8.0  # the audio that the encoder sees
    loudness_lufs: float = -23.0
    steps: int = 4
    shift: float = 5.0
    sampler: Sampler = "renoise"  # "renoise" for distilled weights, "euler" for a plain flow model
    color_strength: float = 1.0
    # Classifier-free guidance by the audio (Ho and Salimans, arXiv 2207.12598): velocities v0 + g (v - v0)
    # with v0 the one without audio, a second pass, at noise levels from `guided_below` down (Kynkäänniemi et
    # al., arXiv 2404.07724).  1: v, as distilled weights want.
    audio_guidance: float = 1.0
    guided_below: float = 1.0

    @property
    def new_frames(self) -> int:
        """Frames a chunk hands out."""
        return self.frames - self.motion_frames

    @property
    def samples_per_frame(self) -> int:
        return self.sample_rate_hz // self.fps

    @property
    def chunk_samples(self) -> int:
        """Audio samples a chunk consumes."""
        return self.new_frames * self.samples_per_frame

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // 4 + 1


T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass `cls` from JSON `values`; an unknown key raises CheckpointError."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - names)
    if unknown:
        raise CheckpointError(
            f"{where}: unknown settings {unknown} for {cls.__name__}; it was written by another version"
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def nvtx_enabled() -> bool:
    """FLASHTALK_NVTX=1 turns the profiler ranges on."""
    return os.environ.get("FLASHTALK_NVTX", "0") == "1"

"""Frozen configurations, and the only place that reads the environment.

The numbers are the published system's (SoulX-FlashTalk 14B); the embedded toy overrides them in its
`flashtalk.json`.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import CheckpointError

SIZE_MULTIPLE = 16  # pixels: the VAE's stride of 8 times the patch of 2
MAX_STEPS = 1000  # the timesteps of the schedule

Sampler = Literal["renoise", "adams_bashforth"]
Precision = Literal["fp32", "bf16", "fp8", "8bit"]
FLOAT8: tuple[Precision, ...] = ("fp8", "8bit")  # the DiT's large products; 8bit: its self-attention too

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
    sampler: Sampler = "renoise"  # for distilled weights; "adams_bashforth" for a plain flow model
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


# The least value of a number that need not be positive; all are under _LARGEST.
_LARGEST = 1e9
_LEAST = {
    "color_strength": 0.0,
    "audio_guidance": 0.0,
    "guided_below": 0.0,
    "min_portrait_psnr_db": 0.0,
    "latent_mean": -_LARGEST,
    "loudness_lufs": -_LARGEST,
}


def from_mapping(cls: type[T], values: Any, where: str) -> T:
    """Build the frozen dataclass `cls` from the JSON object `values`, which must hold every field.

    CheckpointError names what is missing, unknown, of another type or out of range.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is {values!r}; it must be an object of settings")
    kinds = get_type_hints(cls)
    for problem, keys in (("lacks", kinds.keys() - values), ("has unknown", values.keys() - kinds)):
        if keys:
            raise CheckpointError(
                f"{where} {problem} settings {', '.join(sorted(keys))}; "
                "it is damaged or was written by another version"
            )
    for key, value in values.items():
        wanted = _wanted(key, kinds[key], value)
        if wanted:
            raise CheckpointError(f"{where}: {key} is {value!r}; it must be {wanted}")
    config = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    conflict = _conflict(config)
    if conflict:
        raise CheckpointError(f"{where}: {conflict}")
    return config


def _wanted(key: str, kind: Any, value: object) -> str:
    """What `value` should be, a `kind`; empty where it is."""
    if get_origin(kind) is Literal:
        return "" if value in get_args(kind) else f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        good = isinstance(value, list) and not any(_wanted(key, kind, item) for item in value)
        return "" if good else f"a list, each {_wanted(key, kind, None)}"
    if kind not in (int, float):
        plain = get_origin(kind) or kind
        names = {str: "text", bool: "true or false", dict: "an object"}
        return "" if isinstance(value, plain) else names[plain]
    least = _LEAST.get(key)
    wanted = f"a positive {kind.__name__}" if least is None else f"a {kind.__name__} from {least:g} on"
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not value < _LARGEST:
        return wanted
    return "" if value > 0 or (least is not None and value >= least) else wanted


def _conflict(config: object) -> str:
    """The first setting that does not go with the others; empty where all do."""
    rules: list[tuple[bool, str, str]] = []
    match config:
        case DiTConfig() as c:
            rules = [
                (c.dim % (2 * c.num_heads) == 0, "num_heads", f"divide dim {c.dim} into even widths"),
                (c.audio_window % 2 == 1, "audio_window", "be odd"),
            ]
        case VAEConfig() as c:
            rules = [
                (len(c.dim_mult) == 4, "dim_mult", "have 4 values"),
                (len(c.latent_mean) == c.z_dim, "latent_mean", f"have z_dim {c.z_dim} values"),
                (len(c.latent_std) == c.z_dim, "latent_std", f"have z_dim {c.z_dim} values"),
            ]
        case StreamConfig() as c:
            ring = round(c.ring_s * c.sample_rate_hz)
            rules = [
                (c.height % SIZE_MULTIPLE == 0, "height", f"be a multiple of {SIZE_MULTIPLE}"),
                (c.width % SIZE_MULTIPLE == 0, "width", f"be a multiple of {SIZE_MULTIPLE}"),
                (c.sample_rate_hz % c.fps == 0, "sample_rate_hz", f"be a multiple of fps {c.fps}"),
                (c.frames % 4 == 1, "frames", "be 1 + 4 n"),
                (c.motion_frames % 4 == 1, "motion_frames", "be 1 + 4 n"),
                (c.color_strength <= 1, "color_strength", "be at most 1"),
                (c.motion_frames < c.frames, "motion_frames", f"be less than frames {c.frames}"),
                (ring * c.fps % c.sample_rate_hz == 0, "ring_s", f"last whole frames at {c.fps} fps"),
                (c.ring_s * c.fps >= c.frames, "ring_s", f"last as long as {c.frames} frames"),
                (c.steps <= MAX_STEPS, "steps", f"be at most {MAX_STEPS}"),
            ]
    for good, key, wanted in rules:
        if not good:
            return f"{key} is {getattr(config, key)!r}; it must {wanted}"
    return ""


def nvtx_enabled() -> bool:
    """FLASHTALK_NVTX=1 turns the profiler ranges on."""
    return os.environ.get("FLASHTALK_NVTX", "0") == "1"


def let_threads_sleep() -> None:
    """torch's CPU threads sleep while they wait for each other, unless the environment says otherwise; to be
    called before torch is imported.  By default they spin, which is faster on an idle machine and slower than
    real time beside another busy program (profiles/results/cpu-threads.json)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

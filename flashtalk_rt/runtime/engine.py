"""The engine: a model made ready for one size, precision and number of steps, and how it runs a chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from ..config import SIZE_MULTIPLE, Precision
from ..errors import InputError
from ..modules.audio import audio_windows, normalize_loudness
from ..modules.chunk import NoiseSource, Reference, denoise, reference_latent
from ..modules.color import ColorReference
from ..modules.image import Picture, load_image
from ..modules.model import Model
from ..modules.precision import native_bf16
from ..modules.schedule import timesteps
from .session import Session
from .timing import StageClock

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def default_precision(device: torch.device) -> Precision:
    """bf16 where the device computes it natively, else fp32 (bf16 on an older CPU is emulated)."""
    return "bf16" if native_bf16(device) else "fp32"


@dataclasses.dataclass(frozen=True)
class Constants:
    """What one session's image and prompt contribute to every chunk."""

    reference: Reference
    first_motion: Tensor  # [1, z, 1, h, w]
    color: ColorReference


@dataclasses.dataclass(frozen=True)
class Generated:
    """One chunk, still on the device."""

    latent: Tensor  # [1, z, T, h, w] denoised
    frames: Tensor  # [1, 3, new frames, H, W] in [-1, 1]
    motion: Tensor  # [1, z, m, h, w] for the next chunk


class Engine:
    """Runs chunks of one model at one size, precision and number of steps.

    height, width: pixels, divisible by 16; steps: 1 or more; precision "fp32" or "bf16"; None takes
    the model's own size and steps and the fastest exact precision of its device.  The model's
    networks are converted in place.  Raises InputError for a setting that cannot be served.
    """

    def __init__(
        self,
        model: Model,
        steps: int | None = None,
        precision: Precision | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        stream = model.stream
        self.model = model
        self.device = model.device
        self.height = stream.height if height is None else height
        self.width = stream.width if width is None else width
        self.steps = stream.steps if steps is None else steps
        self.precision: Precision = default_precision(self.device) if precision is None else precision
        for name, side in (("height", self.height), ("width", self.width)):
            if side < SIZE_MULTIPLE or side % SIZE_MULTIPLE:
                raise InputError(f"{name} is {side}; it must be a positive multiple of {SIZE_MULTIPLE}")
        if self.precision not in DTYPES:
            raise InputError(f"precision is {self.precision!r}; use one of {', '.join(get_args(Precision))}")
        self.times = timesteps(self.steps, stream.shift)
        dtype = DTYPES[self.precision]
        model.dit.to(dtype).eval().requires_grad_(False)
        model.vae.to(dtype).eval().requires_grad_(False).channels_last()

    def session(self, image: Picture, prompt: str = "", seed: int = 0) -> Session:
        """Start a stream.  image: a path, a Pillow image or a uint8 array [H, W, 3], scaled to cover
        the engine's size and cropped.  Raises InputError for a picture this model cannot use."""
        pixels = load_image(image, self.height, self.width).to(self.device)
        with torch.inference_mode():
            stream = self.model.stream
            self.model.check_portrait(load_image(image, stream.height, stream.width).to(self.device))
            text = self.model.text_encoder(prompt)[None].to(self.device)
            constants = self.constants(pixels, text, self.model.image_encoder(pixels))
        return Session(self, constants, seed)

    @torch.inference_mode()
    def constants(self, image: Tensor, text: Tensor, image_features: Tensor) -> Constants:
        """image [1, 3, 1, H, W] in [-1, 1]; text [1, L, C]; image_features [1, tokens, C]."""
        model = self.model
        y = reference_latent(model.vae, image, model.stream.frames)
        return Constants(
            Reference(model.dit.context(text, image_features), y),
            model.vae.encode(image),
            ColorReference(image, model.stream.color_strength),
        )

    @torch.inference_mode()
    def audio_features(self, ring: Tensor) -> Tensor:
        """The ring's samples [N] -> the chunk's windows [1, frames, window, blocks, dim]."""
        stream = self.model.stream
        loud = normalize_loudness(ring, stream.sample_rate_hz, stream.loudness_lufs)
        features = self.model.audio_encoder(loud, ring.numel() // stream.samples_per_frame)
        return audio_windows(features, stream.frames, self.model.dit.config.audio_window)

    @torch.inference_mode()
    def run_chunk(
        self,
        constants: Constants,
        motion: Tensor,
        windows: Tensor,
        noise: NoiseSource,
        stopped: Callable[[], bool],
        clock: StageClock,
    ) -> Generated | None:
        """Generate one chunk from its audio windows and the past's motion latents.

        `stopped` is asked after every denoising step; once it says yes the result is None.
        """
        model, stream = self.model, self.model.stream
        with clock.stage("dit"):
            audio = model.dit.audio_context(windows)
            latent = motion
            for partly in denoise(
                model.dit, constants.reference, audio, motion, self.times, stream.sampler, noise
            ):
                latent = partly
                if stopped():
                    return None
        with clock.stage("vae_decode"):
            frames = model.vae.decode(latent).float().clamp(-1, 1)
        with clock.stage("color"):
            frames = constants.color.match(frames)
        with clock.stage("vae_encode"):
            motion = model.vae.encode(frames[:, :, -stream.motion_frames :]).float()
        return Generated(latent, frames[:, :, stream.motion_frames :], motion)

    def latent_shape(self) -> tuple[int, ...]:
        """Of one chunk's latent: (1, z, T, h, w)."""
        channels = self.model.vae.config.z_dim
        return (1, channels, self.model.stream.latent_frames, self.height // 8, self.width // 8)

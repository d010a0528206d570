"""What happens to one chunk between audio features and pixels: shared by the runtime and training."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..config import Sampler, StreamConfig
from .dit import DiT
from .dit_layers import KeysValues, LayerContext, StepConstants
from .schedule import Past, advance
from .vae import VAE

NoiseSource = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the reference image and the prompt contribute: constant over a session."""

    context: list[LayerContext]
    y: Tensor  # [B, 20, T, h, w]: 4 mask channels, 16 of the reference latent
    unheard: list[KeysValues] | None = None  # what stands for no audio, where it guides
    guidance: float = 1.0  # by the audio, and at which noise levels: see `StreamConfig`
    guided_below: float = 1.0

    @classmethod
    def of(cls, dit: DiT, text: Tensor, image: Tensor, y: Tensor, stream: StreamConfig) -> Reference:
        """From text features [B, L, C], image features [B, tokens, C] and `reference_latent`'s y."""
        unheard = None
        if stream.audio_guidance != 1:
            config = dit.config  # training drops audio by zeroing its windows
            shape = (stream.frames, config.audio_window, config.audio_blocks, config.audio_dim)
            unheard = dit.audio_context(y.new_zeros(len(y), *shape))
        return cls(dit.context(text, image), y, unheard, stream.audio_guidance, stream.guided_below)


def reference_latent(vae: VAE, image: Tensor, frames: int) -> Tensor:
    """The DiT's y: the encoding of `image` [B, 3, 1, H, W] followed by mid-grey frames, behind a
    mask that is 1 on the first latent frame.  Returns [B, 4 + z, (frames - 1) / 4 + 1, h, w]."""
    video = torch.cat((image, image.new_zeros(*image.shape[:2], frames - 1, *image.shape[3:])), dim=2)
    latent = vae.encode(video)
    mask = latent.new_zeros(latent.shape[0], 4, *latent.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat((mask, latent), dim=1)


def dit_level(t: float, batch: int, device: torch.device) -> Tensor:
    """Noise level t in [0, 1] as the DiT takes it: [batch] float32 in 0..1000."""
    return torch.full((batch,), t * 1000, device=device)


def predict(
    dit: DiT,
    latent: Tensor,
    t: float,
    reference: Reference,
    audio: Sequence[KeysValues],
    constants: StepConstants | None = None,
) -> Tensor:
    """The velocity of `latent` [B, z, T, h, w] at noise level t in [0, 1], guided as the reference says; the
    same shape.  `constants`: what `dit.step_constants` made of this level and size; None computes it now."""
    step = dit_level(t, latent.shape[0], latent.device) if constants is None else constants
    velocity: Tensor = dit(latent, step, reference.y, reference.context, audio)
    if reference.unheard is None or t > reference.guided_below:
        return velocity
    without: Tensor = dit(latent, step, reference.y, reference.context, reference.unheard)
    return without + reference.guidance * (velocity - without)


def denoise(
    dit: DiT,
    reference: Reference,
    audio: Sequence[KeysValues],
    motion: Tensor,
    times: Sequence[float],
    sampler: Sampler,
    noise: NoiseSource,
) -> Iterator[Tensor]:
    """Denoise one chunk, yielding the latent after every step, so that a caller may stop between.

    motion [B, z, m, h, w]: the past's latent frames, which replace the head of the latent before
    the first step and after every one.  times: noise levels in [0, 1], the last 0.  `noise` draws
    one latent-shaped standard normal: the initial latent, then (sampler "renoise") one after every
    step, the last included, in that order.  Yields [B, z, T, h, w].
    """
    kept = motion.shape[2]
    latent = noise()
    latent[:, :, :kept] = motion
    past: Past | None = None
    for t, s in itertools.pairwise(times):
        velocity = predict(dit, latent, t, reference, audio)
        fresh = noise() if sampler == "renoise" else None
        latent = advance(sampler, latent, velocity, t, s, fresh, past).to(latent.dtype)
        past = Past(velocity, t)
        latent[:, :, :kept] = motion
        yield latent

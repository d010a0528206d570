"""`Model`: every network one stream needs, and the settings it was trained for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ..config import StreamConfig
from ..errors import InputError
from .dit import DiT
from .vae import VAE


class AudioEncoder(Protocol):
    """Speech to features, one vector a block and a video frame."""

    def __call__(self, samples: Tensor, frames: int) -> Tensor:
        """samples [N] float32, 16 kHz, already at -23 LUFS -> [frames, blocks, dim]."""
        ...


class ImageEncoder(Protocol):
    """The reference image to tokens."""

    def __call__(self, image: Tensor) -> Tensor:
        """image [1, 3, 1, H, W] in [-1, 1] -> [1, tokens, dim]."""
        ...


class TextEncoder(Protocol):
    """The prompt to tokens."""

    def __call__(self, prompt: str) -> Tensor:
        """-> [L, dim], the real tokens only, L <= text_len."""
        ...


class Released:
    """In the place of an encoder that was released: calling it raises InputError."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise InputError(
            "the model's text and image encoders were released, so no other session can start; "
            "load the model again, or release them after the last session has started"
        )


@dataclasses.dataclass
class Model:
    """What `flashtalk_rt.load` returns.

    `label` is drawn on every frame and written to the metadata when it is not empty: the embedded
    toy says "toy model".  `min_portrait_psnr_db`: pictures that the VAE reconstructs worse than this
    are not of its world (a photograph, for the toy) and are refused; 0 accepts every picture.
    """

    dit: DiT
    vae: VAE
    audio_encoder: AudioEncoder
    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    stream: StreamConfig
    label: str = ""
    min_portrait_psnr_db: float = 0.0

    @property
    def device(self) -> torch.device:
        return next(self.dit.parameters()).device

    def networks(self) -> list[nn.Module]:
        """The parts that are torch modules with weights."""
        parts = (self.dit, self.vae, self.audio_encoder, self.image_encoder, self.text_encoder)
        return [p for p in parts if isinstance(p, nn.Module)]

    def release_encoders(self) -> None:
        """Let go of the text and image encoders, 14 GB of the published weights, which only the start of a
        session needs: sessions that have started go on, another raises InputError.  torch has their memory
        back, for whatever it allocates next."""
        self.text_encoder = self.image_encoder = Released()

    def check_portrait(self, image: Tensor) -> None:
        """Raise InputError for a picture outside the model's world.  image [1, 3, 1, H, W] in [-1, 1],
        of the size the model was trained at: at another, its reconstruction says less."""
        if self.min_portrait_psnr_db <= 0:
            return
        reconstruction = self.vae.decode(self.vae.encode(image)).float()
        # PSNR of a range of 2.
        psnr_db = 10 * math.log10(4 / max((reconstruction - image).square().mean().item(), 1e-10))
        if psnr_db < self.min_portrait_psnr_db:
            raise InputError(
                f"this picture is not one the {self.label or 'model'} can animate (it reconstructs it to "
                f"{psnr_db:.1f} dB, its own cartoon faces to {self.min_portrait_psnr_db:.0f} or more); "
                "give a published checkpoint with --checkpoint for photographs"
            )

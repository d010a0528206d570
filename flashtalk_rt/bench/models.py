"""Random models of any size, and the inputs of one denoising step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..config import DiTConfig, StreamConfig, VAEConfig
from ..errors import InputError
from ..modules.chunk import Reference, predict
from ..modules.dit import DiT
from ..modules.model import Model
from ..modules.vae import VAE

IMAGE_TOKENS = 257
PROMPT_TOKENS = 32


class RandomImageEncoder:
    """In the place of CLIP, which is released once a session has started."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def __call__(self, image: Tensor) -> Tensor:
        """-> [1, tokens, dim], the same whatever the image."""
        generator = torch.Generator(image.device).manual_seed(0)
        return torch.randn(1, IMAGE_TOKENS, self._dim, generator=generator, device=image.device)


class RandomTextEncoder:
    """In the place of umT5, which is released too."""

    def __init__(self, tokens: int, dim: int) -> None:
        self._shape = (tokens, dim)

    def __call__(self, prompt: str) -> Tensor:
        """-> [tokens, dim], the same whatever the prompt."""
        return torch.randn(self._shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have their weights on `device`, in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> DiT:
    """torch's own initialisation, which keeps activations in range; the same weights every time."""
    torch.manual_seed(0)
    with defaults(device, dtype):
        return DiT(config).eval().requires_grad_(False)


def random_vae(config: VAEConfig, device: torch.device, dtype: torch.dtype) -> VAE:
    torch.manual_seed(0)
    with defaults(device, dtype):
        return VAE(config).eval().requires_grad_(False).channels_last()


def published_model(device: str | None = None, height: int | None = None, width: int | None = None) -> Model:
    """The 14B model of the published sizes with random bfloat16 weights, made on a CUDA device (43 GB).

    height, width: pixels; None: 768 x 448.  Raises InputError where `device`, or this machine, is no GPU.
    """
    if not torch.cuda.is_available() or (device or "cuda").startswith("cpu"):
        raise InputError(
            f"the 14B model needs a GPU; the device is {device or 'cpu'}, and torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; see `flashtalk doctor`"
        )
    published = StreamConfig()
    stream = StreamConfig(height=height or published.height, width=width or published.width)
    return random_model(torch.device(device or "cuda"), DiTConfig(), VAEConfig(), stream)


def random_model(device: torch.device, dit: DiTConfig, vae: VAEConfig, stream: StreamConfig) -> Model:
    """Random bfloat16 weights; wav2vec2 of the published size (so `dit` takes 12 blocks of 768) listens, in
    float32 as it does in production."""
    from transformers import Wav2Vec2Config

    from ..modules.encoders import Wav2Vec2AudioEncoder

    dtype = torch.bfloat16
    with defaults(device, torch.float32):
        audio_encoder = Wav2Vec2AudioEncoder(Wav2Vec2Config())
    return Model(
        dit=random_dit(dit, device, dtype),
        vae=random_vae(vae, device, dtype),
        audio_encoder=audio_encoder,
        image_encoder=RandomImageEncoder(dit.image_dim),
        text_encoder=RandomTextEncoder(min(PROMPT_TOKENS, dit.text_len), dit.text_dim),
        stream=stream,
    )


@dataclasses.dataclass(frozen=True)
class DiTInputs:
    """One denoising step's inputs."""

    latent: Tensor  # [1, z, T, h, w]
    text: Tensor  # [1, tokens, C]
    image: Tensor  # [1, tokens, C]
    windows: Tensor  # as `Engine.audio_features` returns them
    y: Tensor  # as `reference_latent` returns it

    @classmethod
    def draw(cls, config: DiTConfig, stream: StreamConfig, device: torch.device) -> DiTInputs:
        """Random ones, for a model of `config` at the size of `stream`."""
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        grid = (stream.latent_frames, stream.height // 8, stream.width // 8)
        audio = (config.audio_window, config.audio_blocks, config.audio_dim)
        return cls(
            normal(1, config.out_dim, *grid),
            normal(1, min(PROMPT_TOKENS, config.text_len), config.text_dim),
            normal(1, IMAGE_TOKENS, config.image_dim),
            normal(1, stream.frames, *audio),
            normal(1, config.in_dim - config.out_dim, *grid),
        )

    def step(self, dit: DiT) -> Callable[[], Tensor]:
        """One call of `dit` at noise level 1/2, its contexts computed now."""
        reference = Reference(dit.context(self.text, self.image), self.y)
        audio = dit.audio_context(self.windows)
        return lambda: predict(dit, self.latent, 0.5, reference, audio)

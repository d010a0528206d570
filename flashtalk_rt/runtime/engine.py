"""The engine: a model made ready for one size, precision and number of steps, and how it runs a chunk."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from ..config import FLOAT8, SIZE_MULTIPLE, Precision
from ..errors import InputError
from ..graphs.buffers import layout
from ..graphs.capture import release_memory
from ..graphs.compiling import compile_ahead
from ..modules.audio import audio_windows, normalize_loudness
from ..modules.chunk import NoiseSource, Reference, reference_latent
from ..modules.color import ColorReference
from ..modules.image import Picture, load_image
from ..modules.model import Model
from ..modules.precision import native_bf16
from ..modules.schedule import timesteps
from ..modules.vae import STRIDE
from ..profiles import nvtx
from .lane import Lane
from .session import Session
from .stages import Constants, Generated, Stages
from .timing import StageClock

# Of what is not float8.
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "8bit": torch.bfloat16,
}


def vae_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What the VAE computes in where the rest is bfloat16: float16 on a GPU, at the same speed; float32 on a
    CPU, of which most emulate bfloat16's convolutions, ten times slower.

    What a stream decodes it encodes again, so the VAE's rounding grows from chunk to chunk: with a bfloat16
    VAE the golden loop's third chunk is off by 5.7e-2, with a float16 one by 1.7e-2; its bound is 2e-2.
    float16's range (65,504) is not shown to hold for the published weights, which we do not have; Wan2GP runs
    this VAE so by default.
    """
    if precision == "fp32" or device.type != "cuda":
        return torch.float32
    return torch.float16


MAX_SEED = 2**63 - 1


def whole_number(value: object, name: str) -> int:
    """`value` as an int; InputError for what is none (1.0 is a float)."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name} is {value!r}; it must be a whole number") from None


def default_precision(model: Model) -> Precision:
    """fp8 for weights stored so; else bf16 where the device computes it natively, else fp32 (bf16 on an
    older CPU is emulated)."""
    if model.dit.fp8:
        return "fp8"
    return "bf16" if native_bf16(model.device) else "fp32"


class Engine:
    """Runs chunks of one model at one size, precision and number of steps.

    height, width: pixels, divisible by 16; steps: 1 to 1000; precision "fp32", "bf16", "fp8" (the DiT's
    large products in float8, all else as in bf16) or "8bit" (its self-attention in eight bits too), with
    losses that the README states; None takes the model's own size and steps, and fp8 for weights that are
    stored so, else the fastest exact precision of its device.  capture: replay the stages from CUDA graphs,
    or launch them one by one with the same result; None captures on a CUDA device.
    The model's networks are converted in place: what bf16 has rounded stays so in a later engine in fp32.
    Raises InputError for a setting that cannot be served.
    """

    def __init__(
        self,
        model: Model,
        steps: int | None = None,
        precision: Precision | None = None,
        height: int | None = None,
        width: int | None = None,
        capture: bool | None = None,
    ) -> None:
        stream = model.stream
        self.model = model
        self.device = model.device
        self.height = stream.height if height is None else whole_number(height, "height")
        self.width = stream.width if width is None else whole_number(width, "width")
        self.steps = stream.steps if steps is None else whole_number(steps, "steps")
        self.precision: Precision = default_precision(model) if precision is None else precision
        for name, side in (("height", self.height), ("width", self.width)):
            if side < SIZE_MULTIPLE or side % SIZE_MULTIPLE:
                raise InputError(f"{name} is {side}; it must be a positive multiple of {SIZE_MULTIPLE}")
        if not isinstance(self.precision, str) or self.precision not in DTYPES:
            raise InputError(f"precision is {self.precision!r}; use one of {', '.join(get_args(Precision))}")
        if model.dit.fp8 and self.precision not in FLOAT8:
            raise InputError(
                f"precision is {self.precision}, but the model's weights are float8 already; "
                "use fp8 or 8bit, or load the model from its original folder"
            )
        self.times = timesteps(self.steps, stream.shift)
        self.capture = self.device.type == "cuda" if capture is None else capture
        if self.capture and self.device.type != "cuda":
            raise InputError(f"capture is True, but {self.device} has no CUDA graphs; leave it out, or False")
        release = release_memory if self.device.type == "cuda" else lambda: None
        model.dit.prepare(
            DTYPES[self.precision],
            fp8=self.precision in FLOAT8,
            eight_bit_attention=self.precision == "8bit",
            release=release,
        )
        model.vae.to(vae_dtype(self.precision, self.device)).eval().requires_grad_(False).prepare()
        self._prepared = self._as_it_is()
        # Few small kernels, which would queue behind denoising's, that fill the device.
        self.audio_lane = Lane(self.device, priority=-1)
        self.audio_lane.prepare_products()
        # On a CUDA device a session hears ahead: the next chunk's audio features overlap this chunk.
        self.hears_ahead = self.device.type == "cuda"
        self._lock = threading.Lock()  # of the stages
        self._stages: Stages | None = None
        self._closed = False

    def session(self, image: Picture, prompt: str = "", seed: int = 0) -> Session:
        """Start a stream.  image: a path, a Pillow image or a uint8 array [H, W, 3], scaled to cover
        the engine's size and cropped.  seed: 0 to 2**63 - 1.  Raises InputError for a picture this model
        cannot use, another seed, after `close`, and after the model's encoders were released."""
        self._check_open()
        seed = whole_number(seed, "seed")
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed is {seed}; it must be from 0 to {MAX_SEED}")
        if not isinstance(prompt, str):
            raise InputError(f"prompt is {prompt!r}; it must be a string, which may be empty")
        pixels = load_image(image, self.height, self.width).to(self.device)
        with torch.inference_mode():
            stream = self.model.stream
            self.model.check_portrait(load_image(image, stream.height, stream.width).to(self.device))
            with nvtx.range("encoder/text"):
                text = self.model.text_encoder(prompt)[None].to(self.device)
            with nvtx.range("encoder/image"):
                features = self.model.image_encoder(pixels)
            constants = self.constants(pixels, text, features)
        return Session(self, constants, seed)

    @torch.inference_mode()
    def constants(self, image: Tensor, text: Tensor, image_features: Tensor) -> Constants:
        """image [1, 3, 1, H, W] in [-1, 1]; text [1, L, C]; image_features [1, tokens, C]."""
        make = functools.partial(self._constants, image, text, image_features)
        if self._stages is None:  # nothing of this engine has run
            compile_ahead(make, self.device)
        return make()

    def _constants(self, image: Tensor, text: Tensor, image_features: Tensor) -> Constants:
        model = self.model
        y = reference_latent(model.vae, image, model.stream.frames)
        return Constants(
            Reference.of(model.dit, text, image_features, y, model.stream),
            model.vae.encode(image),
            ColorReference.of(image, model.stream.color_strength),
        )

    @torch.inference_mode()
    def audio_features(self, ring: Tensor) -> Tensor:
        """The ring's samples [N] -> the chunk's windows [1, frames, window, blocks, dim]."""
        stream = self.model.stream
        loud = normalize_loudness(ring, stream.sample_rate_hz, stream.loudness_lufs)
        with nvtx.range("encoder/audio"):
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
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Generated | None:
        """Generate one chunk from its audio windows and the past's motion latents.

        motion [1, z, 1 or 2, h, w]; windows as `audio_features` returns them; `noise` draws one standard
        normal of `latent_shape`, in the order that `modules.chunk.denoise` states.  `stopped` is asked before
        and after every denoising step and latent frame; once it says yes the result is None.  `meanwhile` is
        called once, in the first step, while the device is busy.  One chunk runs at a time; a second thread
        waits.  The first chunk prepares the stages.  Raises InputError after `close`.
        """
        with self._lock:
            stages = self._prepare(constants, windows)
            if stopped():
                return None
            return stages.run(constants, motion, windows, noise, stopped, clock, meanwhile)

    def close(self) -> None:
        """Release the graphs and their buffers; no session of this engine makes another chunk.

        cuBLAS keeps 34 MB for each of the engine's two streams while the process lives.  torch gives out 32
        streams of a priority, then the first again, so many engines leave no more than 2.2 GB.
        """
        with self._lock:
            self._closed = True
            self._release()

    def _prepare(self, constants: Constants, windows: Tensor) -> Stages:
        """The stages that fit; made (and captured) at the first chunk, and again only should the shapes of
        the constants or the windows change."""
        self._check_open()
        if self._as_it_is() != self._prepared:
            raise InputError(
                f"the model was converted after this engine was made, which runs it in {self.precision}; "
                "load the model once for every precision"
            )
        if self._stages is None or self._stages.layout != layout((constants, windows)):
            self._release()
            self._stages = Stages(
                self.model, self.times, self.latent_shape(), constants, windows, self.capture
            )
        return self._stages

    def _as_it_is(self) -> tuple[torch.dtype, bool, bool]:
        """What `prepare` makes of a DiT, which another engine may change."""
        dit = self.model.dit
        return dit.dtype, dit.fp8, dit.eight_bit_attention

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("this engine was closed; make another")

    def _release(self) -> None:
        stages, self._stages = self._stages, None
        if stages is not None:
            stages.close()

    def latent_shape(self) -> tuple[int, ...]:
        """Of one chunk's latent: (1, z, T, h, w)."""
        channels = self.model.vae.config.z_dim
        return (1, channels, self.model.stream.latent_frames, self.height // STRIDE, self.width // STRIDE)

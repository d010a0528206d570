"""A chunk as a plain loop, and the engine's chunk of the same inputs, to compare the two."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.modules.chunk import denoise
from flashtalk_rt.runtime import Engine
from flashtalk_rt.runtime.stages import Constants, Generated
from flashtalk_rt.runtime.timing import StageClock


def image(seed: int, height: int, width: int) -> Tensor:
    """[1, 3, 1, H, W] in -1..1."""
    return torch.rand(1, 3, 1, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Inputs:
    """What a session gives the engine, made up: constants of one image, windows and noise by seed."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        config = engine.model.dit.config
        text = torch.randn(1, 3, config.text_dim, generator=draw)
        features = torch.randn(1, 5, config.image_dim, generator=draw)
        picture = image(seed, engine.height, engine.width)
        device = engine.device
        self.constants = engine.constants(picture.to(device), text.to(device), features.to(device))
        self._draw, self._engine = draw, engine
        frames = engine.model.stream.frames
        self._windows = (1, frames, config.audio_window, config.audio_blocks, config.audio_dim)

    def windows(self) -> Tensor:
        """The next chunk's audio windows [1, frames, window, blocks, dim]."""
        return torch.randn(self._windows, generator=self._draw).to(self._engine.device)

    def noise(self, seed: int) -> Callable[[], Tensor]:
        """What draws a chunk's noise, in the latent's shape."""
        draw, shape = torch.Generator().manual_seed(seed), self._engine.latent_shape()
        return lambda: torch.randn(shape, generator=draw).to(self._engine.device)


@torch.inference_mode()
def plain_chunk(
    engine: Engine, constants: Constants, motion: Tensor, windows: Tensor, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chunk as a straightforward loop, all frames decoded and matched at once: latent, frames, motion
    and pixels, as in `Generated`."""
    model, stream = engine.model, engine.model.stream
    steps = denoise(
        model.dit,
        constants.reference,
        model.dit.audio_context(windows),
        motion,
        engine.times,
        stream.sampler,
        noise,
    )
    latent = deque(steps, maxlen=1).pop()
    frames = model.vae.decode(latent).float().clamp(-1, 1)
    color = constants.color
    frames = ops.color_match(frames, color.mean, color.std, color.strength)
    motion = model.vae.encode(frames[:, :, -stream.motion_frames :]).float()
    frames = frames[:, :, stream.motion_frames :]
    pixels = ((frames[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu()
    return latent, frames, motion, pixels


def run_chunk(engine: Engine, inputs: Inputs, motion: Tensor, windows: Tensor, seed: int) -> Generated:
    """The engine's chunk, with the noise of `seed`."""
    clock = StageClock(engine.device)
    made = engine.run_chunk(inputs.constants, motion, windows, inputs.noise(seed), lambda: False, clock)
    assert made is not None
    return made


def assert_equals_the_loop(engine: Engine) -> None:
    """Three chunks, each on the one before, are the plain loop's bit for bit."""
    inputs = Inputs(engine)
    motion = loop_motion = inputs.constants.first_motion.float()
    for chunk in range(3):
        windows = inputs.windows()
        made = run_chunk(engine, inputs, motion, windows, chunk)
        expected = plain_chunk(engine, inputs.constants, loop_motion, windows, inputs.noise(chunk))
        got = (made.latent, made.frames, made.motion, made.pixels)
        for name, mine, theirs in zip(("latent", "frames", "motion", "pixels"), got, expected, strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), (chunk, name)
        motion, loop_motion = made.motion, expected[2]

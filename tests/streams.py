"""Small streams for the tests: an engine of the smallest size, a portrait, speech, and a session's chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import tiny
import torch
from torch import Tensor

from flashtalk_rt.modules.model import Model
from flashtalk_rt.runtime import Chunk, Engine, Session
from flashtalk_rt.runtime.stages import Stages

FRAME = 640  # samples
CHUNK = 28 * FRAME  # samples


def portrait(seed: int = 0) -> np.ndarray:
    """Noise, uint8 [64, 80, 3]."""
    return np.random.default_rng(seed).integers(0, 255, (64, 80, 3), dtype=np.uint8)


def speech(samples: int, seed: int = 0) -> Tensor:
    """Noise, float32 [samples]."""
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def small_engine(steps: int = 1) -> Engine:
    """The smallest size there is, so that a chunk takes a fraction of a second."""
    return Engine(tiny.model(), steps=steps, precision="fp32", height=16, width=16)


def gpu_model(wide: bool = False) -> Model:
    """The tiny random model, or the smallest that the kernels of `csrc` serve, on the GPU."""
    model = tiny.model(dit=tiny.DIT_WIDE, vae=tiny.VAE_WIDE) if wide else tiny.model()
    for network in model.networks():
        network.to("cuda")
    return model


def frames_of(chunks: list[Chunk]) -> Tensor:
    """All frames, uint8 [T, H, W, 3]."""
    return torch.cat([chunk.frames for chunk in chunks])


def push(session: Session, *blocks: Tensor) -> list[Chunk]:
    """Push the blocks, iterating after each; the stream goes on."""
    chunks: list[Chunk] = []
    for block in blocks:
        session.push_audio(block)
        chunks += session
    return chunks


def run(session: Session, *blocks: Tensor) -> list[Chunk]:
    """Push the blocks, iterating after each, and end the stream."""
    chunks = push(session, *blocks)
    session.end_audio()
    return [*chunks, *session]


def on_step(engine: Engine, call: Callable[[int], None]) -> Callable[[], int]:
    """Run `call` after every denoising step with its number; returns how to ask for the count."""
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1
        call(count)

    engine.model.dit.register_forward_hook(hook)
    return lambda: count


def on_latent_frame(stages: Stages, call: Callable[[int], None]) -> Callable[[], int]:
    """Run `call` after every latent frame that is decoded, or queued for it, with its number; returns how to
    ask for the count."""
    count = 0

    def counted(color: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            nonlocal count
            color()
            count += 1
            call(count)

        return run

    stages._blocks = tuple(dataclasses.replace(b, color=counted(b.color)) for b in stages._blocks)
    return lambda: count

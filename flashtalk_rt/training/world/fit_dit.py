"""Train the toy's DiT: the base model, and stage 1 on what a stream really gives it."""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ... import ops
from ...config import StreamConfig
from ...modules.dit import DiT
from ...modules.precision import autocast
from ...modules.vae import VAE
from ..loop import FitConfig, Log, fit
from ..stage1 import FlowBatch, batch_windows, drop_condition, flow_matching_loss, sample_times
from .data import ClipKind, Clips, SpeechBank, make_clips

BASE_KINDS = (
    (ClipKind("first", outside=False, reencoded=False, height=96, width=96), 0.25),
    (ClipKind("later", outside=True, reencoded=False, height=96, width=96), 0.75),
)
# The past goes through the VAE once, as in a stream, and the picture has every aspect ratio.
STAGE1_KINDS = (
    (ClipKind("first", outside=False, reencoded=False, height=96, width=96), 0.2),
    (ClipKind("later", outside=True, reencoded=True, height=96, width=96), 0.6),
    (ClipKind("later", outside=True, reencoded=True, height=112, width=80), 0.1),
    (ClipKind("later", outside=True, reencoded=True, height=80, width=112), 0.1),
)
AUDIO_DROPOUT = 0.05
MOTION_NOISE = 0.1  # largest deviation of the noise on the past's latents
Kinds = tuple[tuple[ClipKind, float], ...]


class ClipPool:
    """Encoded clips of every kind, renewed a part at a time while training goes on."""

    PARTS = 4

    def __init__(
        self,
        vae: VAE,
        kinds: Kinds,
        clips: int,
        speakers: int,
        stream: StreamConfig,
        generator: torch.Generator,
    ) -> None:
        self._vae, self._kinds, self._clips = vae, kinds, clips
        self._stream, self._generator = stream, generator
        self._bank = SpeechBank(speakers, 40.0, generator)
        self._parts = [self._make() for _ in range(self.PARTS)]
        self._weights = [movement(clips) for clips in self._parts[0]]
        self._oldest = 0
        # The last share is left out, so that rounding cannot lead past it.
        self._cumulative_shares = list(accumulate(share for _, share in kinds[:-1]))
        self._host = torch.Generator().manual_seed(0)

    def renew(self) -> None:
        """Replace the oldest part by new clips."""
        self._parts[self._oldest] = self._make()
        self._oldest = (self._oldest + 1) % self.PARTS

    def batch(self, step: int, count: int) -> tuple[Clips, Tensor]:
        """A batch of one kind from one part, and the weight of its places (`movement`); over the
        steps, each kind takes its share."""
        # Multiples of the golden ratio, modulo 1, spread evenly however many are taken.
        chosen = bisect(self._cumulative_shares, (step * 0.6180339887) % 1.0)
        part = torch.randint(self.PARTS, (), generator=self._host).item()
        return self._parts[int(part)][chosen].batch(count, self._generator), self._weights[chosen]

    def _make(self) -> list[Clips]:
        return [
            make_clips(
                self._vae,
                self._bank,
                kind,
                max(16, round(self._clips * share / self.PARTS)),
                self._stream,
                self._generator,
            )
            for kind, share in self._kinds
        ]


def movement(clips: Clips) -> Tensor:
    """Where the clips move: [1, 1, 1, h, w], mean 1, half of it even and half by latent variance in time.

    Eyes and mouth are a few places of the latent; an even loss learns them last.  The map is one for
    all clips: a weight of each clip's own movement would pull the model towards clips that move.
    """
    variance = clips.target.float().var(2).mean((0, 1), keepdim=True)[:, :, None]
    return 0.5 + 0.5 * variance / variance.mean()


def flow_batch(
    clips: Clips, weight: Tensor, dit: DiT, stream: StreamConfig, generator: torch.Generator
) -> FlowBatch:
    """Encoded clips as the model's input: mask, windows, dropout, noise on the past."""
    config = dit.config
    mask = torch.zeros_like(clips.reference[:, :4])
    mask[:, :, 0] = 1
    count = len(clips)
    level = MOTION_NOISE * torch.rand(count, 1, 1, 1, 1, generator=generator, device=mask.device)
    noise = torch.randn(clips.motion.shape, generator=generator, device=mask.device)
    windows = batch_windows(clips.features, stream.frames, config.audio_window)
    return FlowBatch(
        target=clips.target,
        noise=torch.randn(clips.target.shape, generator=generator, device=mask.device),
        t=sample_times(count, stream.shift, generator),
        motion=clips.motion + level * noise,
        y=torch.cat((mask, clips.reference), dim=1),
        text=mask.new_zeros(count, 0, config.text_dim),
        image=clips.image,
        audio=drop_condition(windows, AUDIO_DROPOUT, generator),
        weight=weight,
    )


# As in fit_vae: Inductor fuses the plain forms.
@ops.plain_backends()
def fit_dit(
    dit: DiT,
    vae: VAE,
    kinds: Kinds,
    fit_config: FitConfig,
    batch: int,
    clips: int,
    speakers: int,
    renew_every: int,
    stream: StreamConfig,
    checkpoint: Path,
    generator: torch.Generator,
    log: Log,
) -> list[dict[str, float]]:
    """Flow-match `dit` in place on `kinds`; `clips` are alive at a time, a quarter of them renewed
    every `renew_every` steps, cut from as many `speakers`' speech.  Returns the log."""
    device = generator.device
    pool = ClipPool(vae, kinds, clips, speakers, stream, generator)
    log(f"{clips} clips encoded")

    if device.type == "cuda":
        # On an H100 a step takes 28 ms instead of 51; compiling takes 35 s for each number of tokens.
        for block in dit.blocks:
            block.compile(dynamic=False)

    def inputs_of(step: int) -> FlowBatch:
        if step and step % renew_every == 0:
            pool.renew()
        return flow_batch(*pool.batch(step, batch), dit, stream, generator)

    def loss_of(*inputs: Tensor) -> Tensor:
        with autocast(device):
            return flow_matching_loss(dit, FlowBatch(*inputs))

    return fit(dit, inputs_of, loss_of, fit_config, checkpoint, generator, log)

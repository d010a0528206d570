"""A chunk as stages over static buffers: the same callables, replayed from CUDA graphs or run eagerly.

The stages: audio context, every denoising step, decoding the first latent frame and a later one, the colour
of each latent frame, and encoding the last frames as the next chunk's motion.  What differs between chunks
and sessions (windows, noise, motion, session constants) is copied into the buffers between the stages, so
another picture, prompt or seed needs no new capture.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..graphs.buffers import Buffers, copy_tree, layout
from ..graphs.capture import Graphs, Work
from ..graphs.compiling import compile_ahead
from ..modules.chunk import NoiseSource, Reference, dit_level, predict
from ..modules.color import ColorReference
from ..modules.dit_layers import StepConstants
from ..modules.model import Model
from ..modules.schedule import Past, advance
from ..modules.vae import STRIDE
from .lane import Lane
from .timing import StageClock


@dataclasses.dataclass(frozen=True)
class Constants:
    """What one session's image and prompt contribute to every chunk."""

    reference: Reference
    first_motion: Tensor  # [1, z, 1, h, w]
    color: ColorReference


@dataclasses.dataclass(frozen=True)
class Generated:
    """One chunk; its frames are complete, its motion may still be computed on the current stream."""

    latent: Tensor  # [1, z, T, h, w] float32, denoised
    frames: Tensor  # [1, 3, new frames, H, W] float32 in [-1, 1]: a view, until the engine's next chunk
    motion: Tensor  # [1, z, m, h, w] float32, for the next chunk
    pixels: Tensor  # uint8 [new frames, H, W, 3] on the host; pinned where the device is CUDA


@dataclasses.dataclass(frozen=True)
class Block:
    """The frames start..end of one latent frame (1 of the first, else 4), and the stages that fill them."""

    start: int
    end: int
    decode: Work  # of the latent frame; one for all blocks but the first
    color: Work  # what was decoded, into the chunk's frames and pixels


class Stages:
    """The buffers and the stages for one layout of session constants and audio windows.

    One chunk runs at a time: they all use the same buffers.
    """

    def __init__(
        self,
        model: Model,
        times: Sequence[float],
        latent_shape: Sequence[int],
        constants: Constants,
        windows: Tensor,
        capture: bool,
    ) -> None:
        """times: noise levels, the last 0; latent_shape: (1, z, T, h, w); `constants` and `windows` only
        show the layout of what chunks will bring.  To be called, as `run`, in inference mode."""
        self._model = model
        # Graphs know addresses, not tensors: what they read must live as long as they do, whatever becomes of
        # the model.
        networks = (model.dit, model.vae)
        self._weights = [t.data for network in networks for t in (*network.parameters(), *network.buffers())]
        stream, device = model.stream, model.device
        self.layout = layout((constants, windows))
        self.buffers = buffers = Buffers(device)
        self._constants = buffers.like("session", constants)
        self._active: Callable[[], Constants | None] = lambda: None  # whose values the buffers hold
        self._schedule = self._make_schedule(times, latent_shape)
        self._windows = buffers.like("windows", windows)
        self._audio = buffers.like("audio", model.dit.audio_context(self._windows))
        self._noise = buffers.zeros("noise", latent_shape, torch.float32)
        self._latent = buffers.zeros("latent", latent_shape, torch.float32)
        # The prediction of the step before, for the sampler that looks back.
        self._velocity = (
            None if stream.sampler == "renoise" else buffers.zeros("velocity", latent_shape, torch.float32)
        )
        self._latent_frame = buffers.like("latent_frame", self._latent[:, :, :1])
        # What the VAE remembers lies in the convolutions' inputs, 4 GB of them at 768 x 448: 2.5 more than
        # what is remembered, for which nothing is copied between two latent frames.  Decoding the first
        # latent frame makes them: no longer than a chunk's decoding lasts, captured work needs their memory.
        self._rooms: list[Tensor] = []
        height, width = (n * STRIDE for n in latent_shape[3:])
        self._frames = buffers.zeros("frames", (1, 3, stream.frames, height, width), torch.float32)
        self._pixels = buffers.zeros("pixels", (stream.frames, height, width, 3), torch.uint8)
        compile_ahead(functools.partial(self._launch_all, times), device)
        first, later = (
            buffers.like(f"{name}.decoded", decoded)
            for name, decoded in zip(("first", "later"), self._decode_nothing(), strict=True)
        )
        last = model.vae.encode(self._frames[:, :, -stream.motion_frames :])
        self._motion = buffers.zeros("motion", last.shape, torch.float32)

        self.graphs = graphs = Graphs(device, capture)
        # First what takes most memory, which the others then use again.
        self._blocks = self._make_blocks(first, later)
        if graphs.captured:
            self._rooms.clear()
        self._encode = graphs.add(
            lambda: copy_tree(self._motion, model.vae.encode(self._frames[:, :, -stream.motion_frames :]))
        )
        self._audio_context = graphs.add(
            lambda: copy_tree(self._audio, model.dit.audio_context(self._windows))
        )
        # Every step launches the same kernels on the same shapes.
        self._steps = [
            graphs.add(functools.partial(self._step, before, t, s, constants), warm=before is None)
            for before, (t, s), constants in zip(
                (None, *times), itertools.pairwise(times), self._schedule, strict=False
            )
        ]
        self._copies = Lane(device)

    def run(
        self,
        constants: Constants,
        motion: Tensor,
        windows: Tensor,
        noise: NoiseSource,
        stopped: Callable[[], bool],
        clock: StageClock,
        meanwhile: Callable[[], None],
    ) -> Generated | None:
        """One chunk, as `Engine.run_chunk` says."""
        self._activate(constants)
        with clock.stage("audio"):
            self._windows.copy_(windows)
            self._audio_context()
        pixels = self._host_pixels()  # now, as pinning memory takes the host milliseconds
        if not self._denoise(motion, noise, stopped, clock, meanwhile):
            return None
        if not self._decode_all(pixels, stopped, clock):
            return None
        with clock.stage("vae_encode"):
            self._encode()
        self._copies.wait()
        first_new = self._model.stream.motion_frames
        return Generated(self._latent.clone(), self._frames[:, :, first_new:], self._motion.clone(), pixels)

    def close(self) -> None:
        """Destroy the graphs, then let go of the buffers and weights; nothing may be called any more."""
        del self._audio_context, self._steps, self._blocks, self._encode  # they hold the graphs
        self._rooms.clear()
        self.graphs.close()
        self.buffers.close()
        self._weights.clear()

    def _activate(self, constants: Constants) -> None:
        """Have the buffers hold this session's constants.  Sessions may alternate; one that goes on pays
        nothing."""
        if self._active() is not constants:
            copy_tree(self._constants, constants)
            self._active = weakref.ref(constants)  # a closed session's tensors are not kept alive

    def _denoise(
        self,
        motion: Tensor,
        noise: NoiseSource,
        stopped: Callable[[], bool],
        clock: StageClock,
        meanwhile: Callable[[], None],
    ) -> bool:
        """Leave the clean latent in its buffer; False when it was stopped first."""
        device = self._latent.device
        # The number of motion frames differs in the first chunk, so they are laid in outside the graphs.
        head = self._latent[:, :, : motion.shape[2]]
        self._latent.copy_(noise())
        head.copy_(motion)
        for number, step in enumerate(self._steps):
            if self._model.stream.sampler == "renoise":
                self._noise.copy_(noise())
            with clock.stage("dit"):
                step()
                head.copy_(motion)
            if number == 0:
                meanwhile()
            # The host must not queue steps ahead: an interrupt could not take them back.
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            if stopped():
                return False
        return True

    def _host_pixels(self) -> Tensor:
        """Where one chunk's new pixels go on the host; the caller keeps them."""
        shape = (len(self._pixels) - self._model.stream.motion_frames, *self._pixels.shape[1:])
        with torch.inference_mode(False):  # the caller may write to what it gets
            return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pixels.is_cuda)

    def _decode_all(self, host: Tensor, stopped: Callable[[], bool], clock: StageClock) -> bool:
        """Decode and match every latent frame; each one's new pixels leave for `host` at once.  False when it
        was stopped first."""
        first_new, device = self._model.stream.motion_frames, self._latent.device
        sent = False
        queued: list[torch.cuda.Event] = []
        for i, block in enumerate(self._blocks):
            # The host queues one latent frame behind the one that is decoded: the device never waits, and an
            # interrupt takes back the others.
            if len(queued) == 2:
                queued.pop(0).synchronize()
            if stopped():
                break
            self._latent_frame.copy_(self._latent[:, :, i : i + 1])
            with clock.stage("vae_decode"):
                block.decode()
            with clock.stage("color"):
                block.color()
            if device.type == "cuda":
                queued.append(torch.cuda.current_stream(device).record_event())
            new, end = max(block.start, first_new), block.end
            if new >= end:
                continue
            self._copies.follow()
            with self._copies.use():
                host[new - first_new : end - first_new].copy_(self._pixels[new:end], non_blocking=True)
                if not sent:
                    clock.mark("first_frame")
                clock.mark("last_frame")
                sent = True
        self._rooms.clear()
        return not stopped()

    # The stages' callables.  They read and write buffers and, decoding, the rooms.

    def _step(self, before: float | None, t: float, s: float, constants: StepConstants) -> None:
        """`before`: the noise level of the step before, None in the first."""
        sampler = self._model.stream.sampler
        reference = self._constants.reference
        velocity = predict(self._model.dit, self._latent, t, reference, self._audio, constants)
        fresh = self._noise if sampler == "renoise" else None
        past = None if before is None or self._velocity is None else Past(self._velocity, before)
        self._latent.copy_(advance(sampler, self._latent, velocity, t, s, fresh, past))
        if self._velocity is not None:
            self._velocity.copy_(velocity)

    def _decode_first(self) -> Tensor:
        """The frame of a chunk's first latent frame, in new rooms."""
        rooms, device = self._rooms, self._latent.device
        rooms.clear()
        rooms += (torch.empty_like(room, device=device) for room in self._rooms_layout)
        return self._model.vae.decode_step(self._latent_frame, None, clamp=True, rooms=rooms)[0]

    def _decode_later(self) -> Tensor:
        """The frames of any other."""
        vae, rooms = self._model.vae, self._rooms
        return vae.decode_step(self._latent_frame, vae.remembered(rooms), clamp=True, rooms=rooms)[0]

    def _color(self, decoded: Tensor, frames: Tensor, pixels: Tensor) -> None:
        self._constants.color.match(decoded, (frames, pixels[None]))

    # Making them.

    def _launch_all(self, times: Sequence[float]) -> None:
        """Every kernel of a chunk that Triton compiles, on whatever the buffers hold: what compiling them
        ahead takes, at every start, is the time of a denoising step."""
        first, later = self._decode_nothing()
        end = first.shape[2]
        for decoded, at in ((first, slice(end)), (later, slice(end, end + later.shape[2]))):
            self._color(decoded, self._frames[:, :, at], self._pixels[at])
        self._model.vae.encode(self._frames[:, :, -self._model.stream.motion_frames :])
        self._step(None, times[0], times[1], self._schedule[0])

    def _make_schedule(self, times: Sequence[float], latent_shape: Sequence[int]) -> list[StepConstants]:
        """What every step needs of its noise level and the size, computed now, once for all chunks: 5 MB a
        step at the published size.  Nothing writes it again; the weights must not change either."""
        dit, buffers = self._model.dit, self.buffers
        batch, _, *size = latent_shape
        table = dit.positions(size)
        shared = buffers.like("positions", table)  # one for all steps: 6 MB at 768 x 448
        copy_tree(shared, table)
        schedule = []
        for i, t in enumerate(times[:-1]):
            made = dit.modulations(dit_level(t, batch, buffers.device))
            kept = buffers.like(f"modulations.{i}", made)
            copy_tree(kept, made)
            schedule.append(StepConstants(shared, kept))
        return schedule

    def _decode_nothing(self) -> tuple[Tensor, Tensor]:
        """The rooms' layout, and frames of the first latent frame and of a later one, for their shapes."""
        self._rooms_layout = self._model.vae.decoding_rooms(self._latent_frame)
        decoded = self._decode_first(), self._decode_later()
        self._rooms.clear()
        return decoded

    def _make_blocks(self, first: Tensor, later: Tensor) -> tuple[Block, ...]:
        """A block for every latent frame, the first decoded into `first` and each other into `later`."""
        graphs = self.graphs
        decodes = (
            graphs.add(lambda: copy_tree(first, self._decode_first())),
            graphs.add(lambda: copy_tree(later, self._decode_later())),
        )
        blocks, end = [], 0
        for i in range(self._latent.shape[2]):
            decoded, decode = (later, decodes[1]) if i else (first, decodes[0])
            start, end = end, end + decoded.shape[2]
            color = functools.partial(
                self._color, decoded, self._frames[:, :, start:end], self._pixels[start:end]
            )
            # From the second on they launch the same kernels on the same shapes.
            blocks.append(Block(start, end, decode, graphs.add(color, warm=i < 2)))
        return tuple(blocks)

"""One stream's state: audio in, chunks of frames out."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from ..modules.audio import AudioRing
from ..modules.samples import mono_block
from .label import draw_label, label_mask
from .timing import StageClock

if TYPE_CHECKING:
    from .engine import Engine
    from .stages import Constants

Samples = Tensor | npt.NDArray[np.floating]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one step of a session hands out."""

    index: int
    frames: Tensor  # uint8 [T, H, W, 3] RGB on the host
    audio: Tensor  # float32 [samples] on the host, what the frames were made for
    timings_ms: dict[str, float]  # stage -> milliseconds


@dataclasses.dataclass(frozen=True)
class Heard:
    """A chunk's sound and its features; the tensors on the device belong to the engine's audio lane."""

    audio: Tensor  # float32 [samples] on the host
    ring: Tensor  # float32 [ring samples] on the device: the stream up to the chunk's end
    windows: Tensor  # as `Engine.audio_features` returns them
    ready: torch.cuda.Event | None  # when `windows` is computed


class Session:
    """A stream, made by `Engine.session`.  Push audio, iterate for chunks.

    Iterating yields every chunk that the pushed audio allows and then stops; it can be resumed after
    more audio.  After `end_audio` the rest comes too, padded with silence and cut to the audio's
    length, to one frame.  The same seed and audio give the same frames, however the audio was cut.
    Every method may be called from any thread.  Chunks are made one at a time: of two threads that iterate,
    one waits, and each chunk goes to one of them.  Should making one raise, its audio is queued again.
    """

    def __init__(self, engine: Engine, constants: Constants, seed: int) -> None:
        stream = engine.model.stream
        self._engine = engine
        self._constants: Constants | None = constants
        self._motion = constants.first_motion.float()
        self._generator = torch.Generator(engine.device).manual_seed(seed)
        with engine.audio_lane.use():
            self._ring = AudioRing(stream.ring_s, stream.sample_rate_hz, engine.device).samples()
        self._ahead: Heard | None = None  # taken from the queue while the chunk before it was made
        self._pending: deque[Tensor] = deque()
        self._pending_samples = 0
        self._index = 0
        self._ended = False
        self._lock = threading.Lock()  # of the queue and of what `interrupt` reads
        self._turn = threading.Lock()  # held while a chunk is made
        self._running = False
        self._interrupted = threading.Event()
        self._label = label_mask(engine.model.label, engine.height, engine.width)

    def push_audio(self, samples: Samples) -> None:
        """Queue speech: mono float [n], numpy or torch, 16 kHz, any length, nominally in [-1, 1].

        It is copied.  Raises InputError for anything else, for a sample that is NaN, infinite or over
        `MAX_AMPLITUDE`, after `end_audio` and after `close`.
        """
        block = mono_block(samples)
        with self._lock:
            if self._ended or self._constants is None:
                raise InputError("this session takes no more audio: it was ended or closed; start another")
            self._pending.append(block)
            self._pending_samples += block.numel()

    def end_audio(self) -> None:
        """No more audio comes: iterating now yields the rest."""
        with self._lock:
            self._ended = True

    def interrupt(self) -> None:
        """Drop the queued audio, and the chunk being made within a denoising step.

        An engine's first chunk compiles and captures first, which takes seconds and is not interrupted.
        Once decoding has begun it is dropped within two latent frames (one runs, one is queued), and at its
        end within its encoding: at the published sizes less than a step.

        Iterating then stops.  The stream stays usable: audio pushed from now on continues from the
        last finished chunk.  Not for a signal handler: the code that it stopped may hold the lock that this
        waits for; let it start a thread.
        """
        with self._lock:
            self._drop_pending()
            if self._running:
                self._interrupted.set()

    def close(self) -> None:
        """Release the stream's constants and its queue; it takes no more audio and yields no more chunks.
        The one that is being made is dropped as by `interrupt`."""
        with self._lock:
            self._constants = None
            self._drop_pending()
            if self._running:
                self._interrupted.set()

    def __iter__(self) -> Iterator[Chunk]:
        while (chunk := self._next()) is not None:
            yield chunk

    def _next(self) -> Chunk | None:
        with self._turn:
            return self._take_turn()

    def _take_turn(self) -> Chunk | None:
        with self._lock:
            constants = self._constants
            heard, self._ahead = self._ahead, None
            audio = self._take_chunk() if heard is None else heard.audio
            if constants is None or audio is None:
                return None
            self._interrupted.clear()
            self._running = True
        try:
            return self._make(audio, heard, constants)
        except BaseException:
            self._put_back(audio)
            raise
        finally:
            with self._lock:
                self._running = False

    def _make(self, audio: Tensor, heard: Heard | None, constants: Constants) -> Chunk | None:
        """The chunk that `audio` is for, or None once it was interrupted."""
        engine, stream = self._engine, self._engine.model.stream
        clock = StageClock(engine.device)
        with clock.stage("audio"):
            heard = heard or self._hear(audio, self._ring)
            engine.audio_lane.join(heard.ready)
        ring, windows, stopped = heard.ring, heard.windows, self._interrupted.is_set

        def hear_ahead() -> None:
            if engine.hears_ahead:
                self._hear_ahead(ring)

        made = engine.run_chunk(constants, self._motion, windows, self._noise, stopped, clock, hear_ahead)
        if made is None:
            return None
        timings_ms = clock.timings_ms()  # waits for the chunk's end
        with self._lock:  # an interrupt comes before this, or after the chunk
            if stopped():
                return None
            self._motion, self._ring = made.motion, ring  # what was never shown was never said
            index = self._index
            self._index += 1
        # Whole frames only, and at least one: a tail shorter than a frame still shows its sound.
        count = max(1, min(stream.new_frames, round(audio.numel() / stream.samples_per_frame)))
        return Chunk(index, draw_label(made.pixels[:count], self._label), audio, timings_ms)

    def _hear(self, audio: Tensor, before: Tensor) -> Heard:
        """Audio features of a chunk, on the audio lane; `before`: the ring up to the chunk before."""
        engine, stream = self._engine, self._engine.model.stream
        with engine.audio_lane.use():
            padded = torch.zeros(stream.chunk_samples)
            padded[: audio.numel()] = audio
            ring = AudioRing(stream.ring_s, stream.sample_rate_hz, engine.device)
            ring.push(before)
            ring.push(padded.to(engine.device))
            windows = engine.audio_features(ring.samples())
            return Heard(audio, ring.samples(), windows, engine.audio_lane.mark())

    def _hear_ahead(self, ring: Tensor) -> None:
        """Hear the next chunk, if its audio is queued, while the one whose sound ends `ring` is made."""
        with self._lock:
            audio = None if self._interrupted.is_set() else self._take_chunk()
        if audio is None:
            return
        try:
            heard = self._hear(audio, ring)
        except BaseException:
            self._put_back(audio)
            raise
        with self._lock:
            if not self._interrupted.is_set() and self._constants is not None:
                self._ahead = heard

    def _put_back(self, audio: Tensor) -> None:
        """To the front of the queue: what was taken for a chunk that failed, and what was heard after it."""
        with self._lock:
            if self._interrupted.is_set() or self._constants is None:
                return
            ahead, self._ahead = self._ahead, None
            for part in (audio,) if ahead is None else (ahead.audio, audio):
                self._pending.appendleft(part)
                self._pending_samples += part.numel()

    def _drop_pending(self) -> None:
        self._pending.clear()
        self._pending_samples = 0
        self._ahead = None

    def _take_chunk(self) -> Tensor | None:
        """The next chunk's audio out of the queue; None where there is not enough."""
        count = self._engine.model.stream.chunk_samples
        if self._pending_samples >= count or (self._ended and self._pending_samples):
            return self._take(count)
        return None

    def _take(self, count: int) -> Tensor:
        """The next `count` samples, or all there are."""
        parts = []
        while count and self._pending:
            block = self._pending.popleft()
            parts.append(block[:count])
            if block.numel() > count:
                self._pending.appendleft(block[count:])
            count -= parts[-1].numel()
        taken = torch.cat(parts)
        self._pending_samples -= taken.numel()
        return taken

    def _noise(self) -> Tensor:
        return torch.randn(self._engine.latent_shape(), generator=self._generator, device=self._engine.device)

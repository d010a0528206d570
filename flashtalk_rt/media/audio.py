"""Sound files in: any format, rate and channels, as mono 16 kHz blocks of bounded size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import soxr

from ..errors import InputError
from ..modules.samples import MAX_AMPLITUDE

Samples = npt.NDArray[np.float32]

# How far apart the timestamps of what was read and of what follows, or of the end, may be: above the
# rounding of any container and one codec frame.
GAP_S = 0.1
# Samples that a stream may count and not give: the longest delay of a common encoder (Apple's AAC).
DELAY_SAMPLES = 2112
CONTAINERS = {"matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "ogg"}  # by FFmpeg's names
# Formats whose header or last page knows the length; of others FFmpeg estimates it from the bit rate.
DECLARING = CONTAINERS | {"aiff", "au", "flac", "tta", "wv"}
OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # at most
STREAMED_BYTES = 2**31 - 2**16  # what writes a WAV to a pipe gives it this length or more


class AudioReader:
    """The first audio stream of any file that FFmpeg reads, as mono 16 kHz blocks of about a second.

    Any sample rate and number of channels; channels are averaged.  Every iteration and every
    `scan` opens the file anew.  Raises InputError: missing, empty, no audio stream, a stream that cannot
    be read whole (naming the time reached), a sample that is NaN, infinite or over `MAX_AMPLITUDE`.

    Read whole: everything decodes, over `GAP_S` is missing nowhere, and it reaches the length that the file
    declares.  Iterating finds damage when it gets there: what came before it was yielded.
    """

    def __init__(self, path: str | Path, sample_rate_hz: int = 16_000) -> None:
        self.path = Path(path)
        self.sample_rate_hz = sample_rate_hz
        if not self.path.exists():
            raise InputError(f"audio {path} does not exist; check the path")
        if not self.path.is_file():
            raise InputError(f"audio {path} is not a file; give one recording")
        if self.path.stat().st_size == 0:
            raise InputError(f"audio {path} is an empty file")
        self._open().close()

    def scan(self) -> int:
        """Decode the whole file once; the number of samples an iteration yields.

        It finds damage before any work is done, at several hundred times real time.
        """
        samples = sum(Fraction(block.size, rate_hz) for rate_hz, block in self._seconds())
        count = round(samples * self.sample_rate_hz)
        if count == 0:
            raise InputError(f"audio {self.path} is empty: it gives no sample at {self.sample_rate_hz} Hz")
        return count

    def __iter__(self) -> Iterator[Samples]:
        """float32 [N], mono, at `sample_rate_hz`; N varies, about one second."""
        resampler, current_hz = None, 0
        end = np.zeros(0, np.float32)
        for rate_hz, block in self._seconds():
            if resampler is None or rate_hz != current_hz:
                if resampler is not None:
                    yield resampler.resample_chunk(end, last=True)
                resampler = soxr.ResampleStream(rate_hz, self.sample_rate_hz, 1, dtype="float32")
                current_hz = rate_hz
            yield resampler.resample_chunk(block)
        if resampler is not None:
            yield resampler.resample_chunk(end, last=True)

    def _open(self) -> av.container.InputContainer:
        try:
            container = av.open(f"file:{self.path}")  # the prefix: a colon in a name is no protocol
        except PermissionError:
            raise InputError(f"audio {self.path} cannot be read: permission denied") from None
        except (av.error.FFmpegError, OSError) as error:
            raise InputError(f"audio {self.path} is not a readable sound file: {error.strerror}") from error
        if not container.streams.audio or container.streams.audio[0].codec_context is None:
            container.close()
            raise InputError(f"audio {self.path} has no audio stream that can be decoded")
        return container

    def _seconds(self) -> Iterator[tuple[int, Samples]]:
        """(rate, mono float32 block of about a second); a new block begins where the format changes."""
        held: list[av.AudioFrame] = []
        reached_s, count = 0.0, 0
        for frame in self._frames():
            if held and (_kind(frame) != _kind(held[0]) or count >= frame.sample_rate):
                yield held[0].sample_rate, self._block(held, reached_s)
                reached_s += count / held[0].sample_rate
                held, count = [], 0
            held.append(frame)
            count += frame.samples
        if held:
            yield held[0].sample_rate, self._block(held, reached_s)

    def _block(self, frames: list[av.AudioFrame], start_s: float) -> Samples:
        mono = _mono(frames)
        good = np.abs(mono) <= MAX_AMPLITUDE  # false for NaN too
        if not good.all():
            first = int(np.argmin(good))
            raise InputError(
                f"audio {self.path} has a sample of {mono[first]:g} "
                f"at {start_s + first / frames[0].sample_rate:.2f} s; "
                "samples must be finite, normally in -1..1: export the file again"
            )
        return mono

    def _frames(self) -> Iterator[av.AudioFrame]:
        """Every decoded frame.

        Packets that do not decode at the very end of a bare stream of full length are tags some writers
        append (MP3 lyrics, padding); anywhere else they are damage.
        """
        next_s: float | None = None  # where the next frame should start
        reached_s, slack_s, cut = 0.0, GAP_S, False
        failed: Exception | None = None
        with self._open() as container:
            stream = container.streams.audio[0]
            length_s = _declared_s(container)
            of = f" of {length_s:.2f} s" if length_s else ""
            try:
                for packet in container.demux(stream):
                    cut = packet.is_corrupt if packet.size else cut  # fewer bytes than it should have
                    try:
                        frames = packet.decode()
                    except av.error.InvalidDataError as error:
                        failed = failed or error
                        continue
                    for frame in frames:
                        if failed is not None:
                            raise failed
                        if not frame.samples:
                            continue
                        start_s = (next_s or 0.0) if frame.time is None else frame.time
                        if next_s is not None and start_s > next_s + GAP_S:
                            raise self._not_whole(
                                f"{start_s - next_s:.2f} s are missing at {next_s:.2f} s{of}"
                            )
                        next_s = start_s + frame.samples / frame.sample_rate
                        reached_s = max(reached_s, next_s)  # where files were joined, time starts anew
                        slack_s = GAP_S + DELAY_SAMPLES / frame.sample_rate
                        yield frame
                if failed is not None and not length_s:  # then an estimate is better than nothing
                    length_s = float((stream.duration or 0) * (stream.time_base or 0))
                short = reached_s < length_s - slack_s
                if short or (failed is not None and container.format.name in CONTAINERS):
                    raise failed or self._not_whole(f"{reached_s:.2f} s{of} were read")
                if _ends_early(self.path, container.format.name, cut):
                    raise self._not_whole(f"it breaks off after {reached_s:.2f} s")
            except (av.error.FFmpegError, OSError) as error:
                raise InputError(
                    f"audio {self.path} cannot be decoded after {reached_s:.2f} s{of}: "
                    f"{error.strerror}; the file is damaged, export it again"
                ) from error

    def _not_whole(self, what: str) -> InputError:
        return InputError(
            f"audio {self.path} cannot be read whole: {what}; the file is damaged, export it again"
        )


def _declared_s(container: av.container.InputContainer) -> float:
    """Where the audio stream ends, as the file says; 0 where it only allows an estimate."""
    stream, name = container.streams.audio[0], container.format.name
    # Of an MP3's header frame FFmpeg shows only the encoder's delay, as the start.
    if name not in DECLARING and not (name == "mp3" and stream.start_time):
        return 0.0
    if stream.duration is not None:
        return float(stream.duration * (stream.time_base or 0))
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", ""))  # Matroska's
    if tag is not None:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    alone = len(container.streams) == 1  # else another stream may be longer
    return container.duration / av.time_base if alone and container.duration else 0.0


def _ends_early(path: Path, name: str, cut: bool) -> bool:
    """Whether a file of a format whose length FFmpeg takes from the bytes there are was cut off.

    cut: the last packet has fewer bytes than it should.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if name == "wav":
            return cut and size < int.from_bytes(file.read(8)[4:], "little") + 8 < STREAMED_BYTES
        if name != "ogg":
            return False
        file.seek(max(0, size - OGG_PAGE_BYTES))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _kind(frame: av.AudioFrame) -> tuple[int, str, int]:
    return frame.sample_rate, frame.format.name, frame.layout.nb_channels


def _mono(frames: list[av.AudioFrame]) -> Samples:
    """Mean over the channels of frames of one kind, full scale at 1.0; float32 [samples]."""
    # planar: [channels, N]; packed: [1, N * channels]
    values: npt.NDArray[Any] = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    if frames[0].format.is_packed:
        values = values.reshape(-1, frames[0].layout.nb_channels).T
    if values.dtype == np.uint8:
        scale, zero = 1 / 128, 128.0
    elif values.dtype.kind == "i":
        scale, zero = 1 / 2.0 ** (8 * values.dtype.itemsize - 1), 0.0
    else:
        scale, zero = 1.0, 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        mono: Samples = ((values.mean(axis=0, dtype=np.float64) - zero) * scale).astype(np.float32)
    return mono

"""Video files out: fragmented MP4 that plays however far it got."""

from __future__ import annotations

import contextlib
import os
import struct
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import numpy.typing as npt
import soxr

from .. import files
from ..errors import InputError, OutputError

# AAC frames are 1,024 samples: at 48 kHz 21 ms, less than one video frame, which bounds the tail.
AAC_RATE_HZ = 48_000
# How much finished video a `kill -9` can cost: the span of one MP4 fragment, in microseconds.
FRAGMENT_US = 200_000
# ITU-T H.273 code points that tell a player how the pixels were made.
BT709 = 1
LIMITED_RANGE = 1


def check_output(path: str | Path) -> Path:
    """The path, when an MP4 can be written there; otherwise InputError.  An existing file stays as it is."""
    path = Path(path)
    files.check_output(path, "output")
    if path.suffix.lower() not in (".mp4", ".m4v"):
        raise InputError(f"output {path} must end in .mp4: the video is written as MP4")
    return path


class VideoWriter:
    """A fragmented MP4 (H.264 and AAC) that plays up to its last fragment whenever writing stops.

    The file is created, and an existing one overwritten, by the first `write`, not before.  Frames are
    on disk `FRAGMENT_US` after they were written, without a `close`.
    """

    def __init__(
        self, path: str | Path, height: int, width: int, fps: int, sample_rate_hz: int, comment: str
    ) -> None:
        """`comment` goes into the file's metadata; height and width are even.  See `check_output`."""
        self.path = check_output(path)
        if height % 2 or width % 2:
            raise InputError(f"video size {height} x {width} (height x width): both must be even for H.264")
        self.height, self.width, self.fps, self.sample_rate_hz = height, width, fps, sample_rate_hz
        self.comment = comment
        self.frames = 0  # in the file, or on their way there
        self._samples = 0  # handed to the AAC encoder, at AAC_RATE_HZ
        self._container: av.container.OutputContainer | None = None

    def write(self, frames: npt.NDArray[np.uint8], audio: npt.NDArray[np.float32]) -> None:
        """frames uint8 [T, height, width, 3] RGB; their sound, mono float32, T frames long to one frame.

        Raises OutputError (a full disk, say) with the length that can be played; the file stays.
        """
        want = (len(frames), self.height, self.width, 3)
        if frames.dtype != np.uint8 or frames.shape != want:
            raise InputError(f"frames are {frames.dtype} {frames.shape}, not uint8 {want}")
        samples_per_frame = self.sample_rate_hz // self.fps
        if audio.ndim != 1 or abs(audio.size - len(frames) * samples_per_frame) > samples_per_frame:
            raise InputError(f"{len(frames)} frames came with sound of shape {audio.shape}")
        try:
            if self._container is None:
                self._container = self._create()
            self._encode_audio(self._resampler.resample_chunk(np.ascontiguousarray(audio, np.float32)))
            for pixels in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                picture.pts, picture.time_base = self.frames, Fraction(1, self.fps)
                self._container.mux(self._video.encode(picture))
                self._sink.check()
                self.frames += 1
        except (av.error.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Write what the encoders still hold.  Raises OutputError as `write` does."""
        if self._container is None:
            return
        try:
            self._encode_audio(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))
            self._container.mux(self._video.encode(None))
            self._container.mux(self._audio.encode(None))
            self._container.close()
            self._sink.check()
        except (av.error.FFmpegError, OSError) as error:
            raise self._failed(error) from error
        self._sink.close()
        self._container = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _create(self) -> av.container.OutputContainer:
        self._sink = _Sink(self.path)
        container = av.open(
            self._sink,
            "w",
            format="mp4",
            options={
                # delay_moov waits for the first packets, so that the header can hold the edit list that
                # hides the AAC encoder's priming samples.
                "movflags": "empty_moov+default_base_moof+delay_moov",
                "frag_duration": str(FRAGMENT_US),
                "flush_packets": "1",
            },
        )
        container.metadata["title"] = "flashtalk"
        container.metadata["comment"] = self.comment
        # zerolatency: no B-frames and no look-ahead, a frame leaves the encoder as it comes in.
        video = container.add_stream(
            "libx264",
            rate=self.fps,
            options={"preset": "veryfast", "crf": "18", "tune": "zerolatency"},
        )
        video.height, video.width, video.pix_fmt = self.height, self.width, "yuv420p"
        context = video.codec_context
        context.gop_size = 2 * self.fps
        context.color_range, context.colorspace = LIMITED_RANGE, BT709
        context.color_primaries, context.color_trc = BT709, BT709
        audio = container.add_stream("aac", rate=AAC_RATE_HZ, layout="mono")
        audio.bit_rate = 96_000
        self._resampler = soxr.ResampleStream(self.sample_rate_hz, AAC_RATE_HZ, 1, dtype="float32")
        self._video, self._audio = video, audio
        return container

    def _encode_audio(self, samples: npt.NDArray[np.float32]) -> None:
        if self._container is None or samples.size == 0:
            return
        sound = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts = AAC_RATE_HZ, self._samples
        sound.time_base = Fraction(1, AAC_RATE_HZ)
        self._samples += samples.size
        self._container.mux(self._audio.encode(sound))

    def _failed(self, error: av.error.FFmpegError | OSError) -> OutputError:
        """Give the file up where it stands, and say how much of it plays."""
        container, self._container = self._container, None
        if container is not None:
            with contextlib.suppress(av.error.FFmpegError, OSError):
                container.close()
            self._sink.close()
        _cut_to_last_fragment(self.path)
        self.frames = round(playable_s(self.path) * self.fps)
        kept_s = self.frames / self.fps
        kept = f"{kept_s:.2f} s of video are kept there" if kept_s else "nothing was kept"
        return OutputError(f"output {self.path} cannot be written: {error.strerror or error}; {kept}")


class _Sink:
    """A file for FFmpeg to write to that remembers the first error: FFmpeg forgets one in the trailer."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest and self._error is None:
            try:
                rest = rest[os.write(self._file, rest) :]
            except OSError as error:
                self._error = error
        return len(data)

    def check(self) -> None:
        """Raise the error, if one was met."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        os.close(self._file)


def _cut_to_last_fragment(path: Path) -> None:
    """Drop a half-written fragment from the end of an MP4: some players stop with an error there."""
    try:
        with open(path, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start, whole = 0, 0
            while start + 8 <= size:
                file.seek(start)
                length, kind = struct.unpack(">I4s", file.read(8))
                if length < 8:
                    break
                start += length
                if start <= size and kind in (b"moov", b"mdat"):
                    whole = start
            file.truncate(whole)
    except OSError:
        pass  # then whatever there is stays: `playable_s` says how much of it plays


def playable_s(path: str | Path) -> float:
    """Seconds of video that a player finds in `path`; 0 when it finds none."""
    try:
        with av.open(f"file:{path}") as container:
            video = container.streams.video[0]
            packets = sum(packet.size > 0 for packet in container.demux(video))
            return float(packets / (video.average_rate or 1))
    except (av.error.FFmpegError, OSError, IndexError):
        return 0.0

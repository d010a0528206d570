"""Pictures, sound and video files for the tests, and reading them back."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from flashtalk_rt.media import VideoWriter

RATE = 16_000


def picture() -> Image.Image:
    """120 x 80 pixels: left half (200, 40, 90), right half (20, 180, 60)."""
    pixels = np.empty((80, 120, 3), np.uint8)
    pixels[:, :60] = (200, 40, 90)
    pixels[:, 60:] = (20, 180, 60)
    return Image.fromarray(pixels)


def encode(
    path: Path,
    samples: np.ndarray,
    codec: str,
    rate_hz: int,
    layout: str,
    fmt: str | None = None,
    muxer: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
) -> None:
    """samples [channels, N] float -> a sound file."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout, options=encoder or {})
        if fmt is not None:
            stream.format = fmt
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_wav(path: Path, samples: np.ndarray, rate_hz: int = RATE) -> Path:
    """Mono float32 WAV, any values."""
    raw = samples.astype("<f4").tobytes()
    header = b"WAVEfmt " + (18).to_bytes(4, "little") + (3).to_bytes(2, "little") + (1).to_bytes(2, "little")
    header += rate_hz.to_bytes(4, "little") + (4 * rate_hz).to_bytes(4, "little")
    header += (4).to_bytes(2, "little") + (32).to_bytes(2, "little") + b"\0\0"
    header += b"data" + len(raw).to_bytes(4, "little")
    path.write_bytes(b"RIFF" + (len(header) + len(raw)).to_bytes(4, "little") + header + raw)
    return path


def tone(seconds: float, rate_hz: int, hz: float = 440.0) -> np.ndarray:
    """A sine of amplitude 0.5, float64 [samples]."""
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)


def write_broken_mp3(path: Path) -> None:
    """1.5 s of noise; some of it, in the middle, is no MP3."""
    rng = np.random.default_rng(0)
    encode(path, rng.uniform(-0.5, 0.5, (2, 66_150)), "libmp3lame", 44_100, "stereo", None)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = rng.bytes(3000)
    path.write_bytes(data)


def striped_frames(count: int) -> np.ndarray:
    """uint8 [count, 64, 48, 3], of alternating colours: every frame can be told from its neighbours."""
    frames = np.empty((count, 64, 48, 3), np.uint8)
    frames[0::2], frames[1::2] = (200, 40, 90), (20, 180, 60)
    return frames


def write_video(path: Path, samples: np.ndarray, close: bool = True) -> VideoWriter:
    """In chunks of 28 frames, the last one cut to the sound, as a session hands them out."""
    writer = VideoWriter(path, 64, 48, 25, RATE, "toy model: test")
    for start in range(0, samples.size, 28 * 640):
        sound = samples[start : start + 28 * 640].astype(np.float32)
        writer.write(striped_frames(max(1, round(sound.size / 640))), sound)
    if close:
        writer.close()
    return writer


def decode(path: Path) -> tuple[list[av.VideoFrame], np.ndarray]:
    """Every frame, and the sound as the file has it: 48 kHz, float32 [samples]."""
    with av.open(str(path)) as container:
        pictures = list(container.decode(video=0))
    with av.open(str(path)) as container:
        sound = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return pictures, np.concatenate(sound)

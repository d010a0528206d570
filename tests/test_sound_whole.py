"""Sound that is damaged or cut off is refused, and sound that is whole never is."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from media_files import RATE, encode, write_wav

from flashtalk_rt.errors import InputError
from flashtalk_rt.media import AudioReader

SECONDS = 7.77
VBR = {"flags": "+qscale", "global_quality": str(4 * 118)}
FRAGMENTS = {"movflags": "empty_moov+default_base_moof+delay_moov", "frag_duration": "200000"}
# name -> codec, channels, and options of the muxer and the encoder
KINDS: dict[str, tuple[str, int, dict[str, str], dict[str, str]]] = {
    "a.wav": ("pcm_s16le", 1, {}, {}),
    "a.flac": ("flac", 2, {}, {}),
    "cbr.mp3": ("libmp3lame", 1, {}, {}),
    "vbr.mp3": ("libmp3lame", 1, {}, VBR),
    "headless-cbr.mp3": ("libmp3lame", 1, {"write_xing": "0"}, {}),
    "headless-vbr.mp3": ("libmp3lame", 1, {"write_xing": "0"}, VBR),
    "vorbis.ogg": ("vorbis", 2, {}, {"strict": "experimental"}),
    "flac.oga": ("flac", 1, {}, {}),
    "a.opus": ("libopus", 1, {}, {}),
    "a.m4a": ("aac", 1, {}, {}),
    "fast.m4a": ("aac", 2, {"movflags": "faststart"}, {}),
    "fragments.m4a": ("aac", 1, FRAGMENTS, {}),
    "a.aac": ("aac", 1, {}, {}),
    "a.webm": ("libopus", 1, {}, {}),
    "aac.mka": ("aac", 1, {}, {}),
    "mp3.mka": ("libmp3lame", 1, {}, {}),
    "a.aiff": ("pcm_s16be", 1, {}, {}),
    "a.au": ("pcm_s16be", 1, {}, {}),
}


def noise(seconds: float, rate_hz: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.3, 0.3, (channels, round(seconds * rate_hz)))


def write(folder: Path, name: str, seconds: float, rate_hz: int) -> Path:
    codec, channels, muxer, encoder = KINDS[name]
    if name == "a.opus" or name == "a.webm":
        rate_hz = 48_000 if rate_hz > 24_000 else rate_hz  # Opus knows no 44.1 kHz
        rate_hz = 24_000 if rate_hz == 22_050 else rate_hz
    samples = noise(seconds, rate_hz, channels)
    fmt = "s16" if codec.startswith("pcm") else None
    encode(folder / name, samples, codec, rate_hz, ("mono", "stereo")[channels - 1], fmt, muxer, encoder)
    return folder / name


def seconds_of(path: Path) -> float:
    reader = AudioReader(path)
    samples = sum(block.size for block in reader)
    assert samples == reader.scan()
    return samples / RATE


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("name", KINDS)
def test_whole_sound_is_never_refused(tmp_path: Path, name: str, rate_hz: int) -> None:
    for seconds in (0.05, 0.3, 1.0, 2.37):
        try:
            path = write(tmp_path, name, seconds, rate_hz)
            av.open(str(path)).close()
        except av.error.FFmpegError:
            assert seconds == 0.05 and (name.startswith("headless") or name == "a.aac"), (
                "too short for FFmpeg"
            )
            continue
        # What encoders pad is at most two of their frames.
        assert -0.001 < seconds_of(path) - seconds < 0.02 + 2 * 1152 / rate_hz


@pytest.mark.parametrize("name", KINDS)
def test_sound_that_was_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, SECONDS, 44_100)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    if name.startswith("headless") or name == "a.aac":  # nothing says how long it was
        assert 4 < seconds_of(path) < 5
        return
    wanted = "not a readable sound file" if name == "a.m4a" else "cannot be (read whole|decoded)"
    with pytest.raises(InputError, match=wanted) as caught:
        AudioReader(path).scan()
    assert str(path) in str(caught.value)


def lossy_and_framed() -> list[str]:
    """PCM cannot tell its samples from others."""
    return [name for name in KINDS if not KINDS[name][0].startswith("pcm")]


@pytest.mark.parametrize("kind", ["zeros", "noise"])
@pytest.mark.parametrize("name", lossy_and_framed())
def test_sound_that_is_damaged_in_the_middle_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path, name, SECONDS, 44_100)
    data = bytearray(path.read_bytes())
    count = len(data) // 20
    start = len(data) // 2 - count // 2
    data[start : start + count] = bytes(count) if kind == "zeros" else np.random.default_rng(0).bytes(count)
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{name} (cannot be (read whole|decoded)|is not a readable)"):
        AudioReader(path).scan()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.flac", r"cannot be decoded after \d\.\d\d s of 7\.77 s"),
        ("vbr.mp3", r"4\.\d\d s of 7\.77 s were read"),
        ("vorbis.ogg", r"it breaks off after 4\.\d\d s"),
        ("a.wav", r"it breaks off after 4\.66 s"),
        ("a.webm", r"4\.\d\d s of 7\.78 s were read"),
    ],
)
def test_what_came_before_the_damage_is_read(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path, name, SECONDS, 44_100)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    read = 0
    with pytest.raises(InputError, match=text):
        for block in AudioReader(path):
            read += block.size
    assert read > 2.9 * RATE


def test_a_gap_is_refused(tmp_path: Path) -> None:
    """A page of Ogg is missing: what follows would be early."""
    path = write(tmp_path, "a.opus", SECONDS, 48_000)
    pages = path.read_bytes().split(b"OggS")[1:]
    path.write_bytes(b"".join(b"OggS" + page for i, page in enumerate(pages) if i != 5))
    with pytest.raises(InputError, match=r"1\.00 s are missing at 3\.\d\d s of 7\.78 s"):
        AudioReader(path).scan()


def test_a_live_recording_that_begins_late_and_ends_anywhere_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "a.opus", SECONDS, 48_000)
    pages = path.read_bytes().split(b"OggS")[1:]
    path.write_bytes(b"".join(b"OggS" + page for page in (*pages[:2], *pages[5:-1])))
    assert seconds_of(path) == pytest.approx(4, abs=0.1)


def test_joined_ogg_files_are_whole(tmp_path: Path) -> None:
    short = write(tmp_path, "a.opus", 1.0, 48_000).read_bytes()
    long = write(tmp_path, "a.opus", 2.5, 48_000).read_bytes()
    for data in (short + long, long + short):
        (tmp_path / "b.opus").write_bytes(data)
        assert seconds_of(tmp_path / "b.opus") == pytest.approx(3.5, abs=0.02)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_from_a_pipe_does_not_know_its_length(tmp_path: Path, size: int) -> None:
    path = write_wav(tmp_path / "a.wav", noise(1.5, RATE)[0])
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = size.to_bytes(4, "little")
    data[4:8] = min(size + at - 4, 0xFFFFFFFF).to_bytes(4, "little")
    path.write_bytes(data)
    assert seconds_of(path) == pytest.approx(1.5, abs=1e-4)


def test_a_flac_from_a_pipe_does_not_know_its_length(tmp_path: Path) -> None:
    path = write(tmp_path, "a.flac", 1.5, 44_100)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert seconds_of(path) == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize(("sound_s", "video_s"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_video_of_another_length_does_not_count(
    tmp_path: Path, name: str, sound_s: int, video_s: int
) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=25)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=48_000, layout="mono")
        for i in range(25 * video_s):
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = i, Fraction(1, 25)
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(
            noise(sound_s, 48_000).astype(np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate, sound.pts, sound.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    assert seconds_of(path) == pytest.approx(sound_s, abs=0.05)
    if name == "a.mkv" and sound_s > video_s:  # its sound has a declared length of its own
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match="read whole"):
            AudioReader(path).scan()

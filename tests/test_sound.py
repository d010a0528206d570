"""Sound in: every kind that is promised, and every refusal."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import RATE, encode, picture, tone, write_wav

from flashtalk_rt.errors import InputError
from flashtalk_rt.media import AudioReader


def read(path: Path) -> np.ndarray:
    reader = AudioReader(path)
    samples = np.concatenate(list(reader))
    assert samples.dtype == np.float32
    assert reader.scan() == samples.size
    return samples


@pytest.mark.parametrize(
    ("name", "codec", "rate_hz", "layout", "fmt", "slack_s", "tolerance"),
    [
        ("a.wav", "pcm_u8", 8_000, "mono", "u8", 0, 0.01),
        ("a.wav", "pcm_s16le", 11_025, "mono", "s16", 0, 1e-3),
        ("a.wav", "pcm_s16le", 44_100, "stereo", "s16", 0, 1e-3),
        ("a.wav", "pcm_s24le", 96_000, "5.1", "s32", 0, 1e-4),
        ("a.wav", "pcm_f32le", 192_000, "mono", "flt", 0, 1e-4),
        ("a.wav", "pcm_f64le", 48_000, "stereo", "dbl", 0, 1e-4),
        ("a.flac", "flac", 22_050, "stereo", None, 0, 1e-3),
        ("a.mp3", "libmp3lame", 44_100, "stereo", None, 0.03, 0.05),
        ("a.m4a", "aac", 44_100, "stereo", None, 0.03, 0.05),
        ("a.ogg", "libopus", 48_000, "mono", None, 0.03, 0.05),
        ("a.webm", "libopus", 48_000, "stereo", None, 0.03, 0.05),
    ],
)
def test_every_kind_of_sound_gives_the_same_samples(
    tmp_path: Path,
    name: str,
    codec: str,
    rate_hz: int,
    layout: str,
    fmt: str | None,
    slack_s: float,
    tolerance: float,
) -> None:
    channels = av.AudioLayout(layout).nb_channels
    encode(tmp_path / name, np.tile(tone(2.5, rate_hz), (channels, 1)), codec, rate_hz, layout, fmt)
    samples = read(tmp_path / name)
    assert abs(samples.size - 2.5 * RATE) <= max(1, slack_s * RATE)
    middle = slice(RATE // 4, 2 * RATE)  # away from the ends, where filters and codecs ring
    assert np.abs(samples[middle] - tone(2.5, RATE)[middle]).max() < tolerance


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = np.full(RATE, 0.75), np.full(RATE, -0.25)
    encode(tmp_path / "a.wav", np.stack([left, right]), "pcm_s16le", RATE, "stereo", "s16")
    encode(tmp_path / "b.flac", np.stack([left, right]), "flac", RATE, "stereo", None)
    for name in ("a.wav", "b.flac"):
        assert np.abs(read(tmp_path / name) - 0.25).max() < 1e-3


@pytest.mark.parametrize("count", [1, 319, 640, 17_919, 17_920, 17_921, 40_000])
def test_at_16_khz_samples_come_through_untouched(tmp_path: Path, count: int) -> None:
    samples = np.random.default_rng(count).uniform(-1, 1, count).astype(np.float32)
    assert np.array_equal(read(write_wav(tmp_path / "a: b.wav", samples)), samples)


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 192_000])
def test_the_number_of_samples_is_exact_at_any_rate(tmp_path: Path, rate_hz: int) -> None:
    for count in (rate_hz // 100, rate_hz + 1, 2 * rate_hz + 77):
        samples = read(write_wav(tmp_path / "a.wav", np.zeros(count), rate_hz))
        assert abs(samples.size - count * RATE / rate_hz) <= 0.5


def test_a_long_recording_is_read_in_blocks(tmp_path: Path) -> None:
    """20 minutes are 77 MB as float32 at 16 kHz; 8 kHz in, so that the resampler works too."""
    path = write_wav(tmp_path / "a.wav", np.tile(tone(1, 8_000).astype(np.float32), 1200), 8_000)
    tracemalloc.start()
    total = sum(block.size for block in AudioReader(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 1200 * RATE
    assert peak_bytes < 4e6


def test_tags_after_an_mp3_are_not_damage(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp3", np.tile(tone(1.5, 44_100), (2, 1)), "libmp3lame", 44_100, "stereo", None)
    data = (tmp_path / "a.mp3").read_bytes()
    whole = read(tmp_path / "a.mp3").size
    (tmp_path / "b.mp3").write_bytes(data + b"LYRICSBEGIN" + b"a" * 300 + b"LYRICS200")
    assert read(tmp_path / "b.mp3").size == whole


def test_bad_sound_files_are_refused_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, codec in (("m.mp3", "libmp3lame"), ("m.m4a", "aac"), ("m.flac", "flac")):
        encode(tmp_path / name, rng.uniform(-0.5, 0.5, (2, 66_150)), codec, 44_100, "stereo", None)
    broken = bytearray((tmp_path / "m.mp3").read_bytes())
    broken[len(broken) // 2 : len(broken) // 2 + 3000] = rng.bytes(3000)
    (tmp_path / "broken.mp3").write_bytes(broken)
    whole = (tmp_path / "m.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    whole = (tmp_path / "m.m4a").read_bytes()
    (tmp_path / "cut.m4a").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "noise.wav").write_bytes(rng.bytes(20_000))
    (tmp_path / "text.txt").write_text("hello\n" * 100)
    picture().save(tmp_path / "picture.png")
    write_wav(tmp_path / "zero.wav", np.zeros(0))
    samples = np.zeros(3 * RATE, np.float32)
    for name, value in (("nan", np.nan), ("inf", np.inf), ("huge", 1e30)):
        samples[2 * RATE] = value
        write_wav(tmp_path / f"{name}.wav", samples)
    wanted = {
        "missing.wav": "does not exist",
        ".": "not a file",
        "empty.wav": "empty file",
        "zero.wav": "gives no sample at",
        "noise.wav": "not a readable sound file",
        "text.txt": "no audio stream",
        "picture.png": "no audio stream",
        "broken.mp3": r"cannot be decoded after 0\.\d\d s",
        "cut.flac": r"cannot be decoded after 0\.\d\d s",
        "cut.m4a": "not a readable sound file",
        "nan.wav": r"nan at 2\.00 s",
        "inf.wav": r"inf at 2\.00 s",
        "huge.wav": r"1e\+30 at 2\.00 s",
    }
    for name, text in wanted.items():
        with pytest.raises(InputError, match=text) as caught:
            AudioReader(tmp_path / name).scan()
        assert str(tmp_path / name) in str(caught.value)

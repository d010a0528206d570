"""Pictures and sound in, video out: every kind that is promised, every refusal, and what a kill leaves."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from flashtalk_rt.errors import InputError, OutputError
from flashtalk_rt.media import AudioReader, VideoWriter, check_output, playable_s
from flashtalk_rt.modules.image import load_image, open_image

RATE = 16_000


# Pictures


def picture(width: int = 120, height: int = 80) -> Image.Image:
    """Left half (200, 40, 90), right half (20, 180, 60)."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (200, 40, 90)
    pixels[:, width // 2 :] = (20, 180, 60)
    return Image.fromarray(pixels)


def corner(image: Image.Image) -> tuple[int, ...]:
    return tuple(np.asarray(image)[5, 5].tolist())


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown by turning it a quarter to the right: the left half comes to the top
    picture().save(tmp_path / "a.png", exif=exif)
    image = open_image(tmp_path / "a.png")
    assert image.size == (80, 120)
    assert np.asarray(image)[5, 75].tolist() == [200, 40, 90]
    assert np.asarray(image)[115, 5].tolist() == [20, 180, 60]


def test_transparency_lies_on_mid_grey(tmp_path: Path) -> None:
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.uint8([0, 255]), (80, 60))))
    image.save(tmp_path / "a.png")
    pixels = np.asarray(open_image(tmp_path / "a.png"))
    assert (pixels[:, 0::2] == 128).all()
    assert pixels[0, 1].tolist() == [200, 40, 90]


@pytest.mark.parametrize(
    ("mode", "name", "tolerance"),
    [
        ("RGB", "a.png", 0),
        ("CMYK", "a.jpg", 30),
        ("CMYK", "a.tif", 1),
        ("RGB", "a.gif", 30),
        ("RGB", "a.webp", 30),
    ],
)
def test_colour_modes_keep_the_colour(tmp_path: Path, mode: str, name: str, tolerance: int) -> None:
    picture().convert(mode).save(tmp_path / name)
    assert np.abs(np.subtract(corner(open_image(tmp_path / name)), (200, 40, 90))).max() <= tolerance


def test_a_transparent_palette_entry_lies_on_mid_grey(tmp_path: Path) -> None:
    image = Image.fromarray(np.tile(np.uint8([0, 1]), (80, 50)), mode="L").convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=0)
    pixels = np.asarray(open_image(tmp_path / "a.png"))
    assert pixels[0, 0].tolist() == [128, 128, 128]
    assert pixels[0, 1].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (np.uint16([0, 257 * 100, 65535]), "a.png"),
        (np.uint16([0, 257 * 100, 65535]), "a.tif"),
        (np.int32([0, 257 * 100, 65535]), "a.tif"),
        (np.float32([0, 100 / 255, 1]), "a.tif"),
        (np.float32([0, 100, 255]), "a.tif"),
        (np.uint8([0, 100, 255]), "a.png"),
    ],
    ids=["16-bit png", "16-bit tiff", "32-bit tiff", "float 0..1", "float 0..255", "8-bit grey"],
)
def test_greys_of_any_depth_span_black_to_white(tmp_path: Path, values: np.ndarray, name: str) -> None:
    Image.fromarray(np.tile(values.repeat(30), (90, 1))).save(tmp_path / name)
    pixels = np.asarray(open_image(tmp_path / name))
    assert [pixels[0, x].tolist() for x in (0, 45, 89)] == [[0] * 3, [100] * 3, [255] * 3]


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (70, 70), "red"), Image.new("RGB", (70, 70), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert np.abs(np.subtract(corner(open_image(tmp_path / "a.gif")), (255, 0, 0))).max() <= 8


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 128), (128, 64), (80, 80)])
@pytest.mark.parametrize("size", [(96, 96), (301, 177), (64, 333)])
def test_the_picture_covers_the_video_and_is_cut_at_its_centre(
    height: int, width: int, size: tuple[int, int]
) -> None:
    across = np.linspace(0, 255, size[0]).astype(np.uint8)
    down = np.linspace(0, 255, size[1]).astype(np.uint8)
    source = np.stack([np.tile(across, (size[1], 1)), np.tile(down[:, None], (1, size[0]))] * 2, -1)[..., :3]
    tensor = load_image(source, height, width)
    assert tensor.shape == (1, 3, 1, height, width)
    assert tensor.dtype.is_floating_point and tensor.abs().max() <= 1
    scale = max(height / size[1], width / size[0])
    for axis, (side, full) in enumerate([(width, size[0]), (height, size[1])]):
        ramp = tensor[0, axis, 0].mean(axis) if axis == 0 else tensor[0, axis, 0].mean(1)
        # Pixel i of the crop shows the place (i + 0.5 - side / 2) / scale from the picture's centre.
        place = (np.arange(side) + 0.5 - side / 2) / scale + full / 2
        expected = (place - 0.5) / (full - 1) * 2 - 1
        assert np.abs(ramp.numpy() - expected)[3:-3].max() < 0.03


def test_black_and_white_become_minus_one_and_one() -> None:
    assert load_image(np.zeros((64, 64, 3), np.uint8), 64, 64).eq(-1).all()
    assert load_image(np.full((64, 64, 3), 255, np.uint8), 64, 64).eq(1).all()
    assert load_image(Image.new("RGB", (64, 64), (51, 51, 51)), 64, 64).allclose(
        load_image(np.full((64, 64, 3), 51, np.uint8), 64, 64)
    )


def test_bad_picture_files_are_refused_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (100, 100, 3), np.uint8))
    for kind in ("png", "jpg", "tif", "webp", "gif", "bmp"):
        noise.save(tmp_path / f"whole.{kind}")
        data = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture\n" * 50)
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (63, 200)).save(tmp_path / "small.png")
    wanted = {
        "missing.png": "does not exist",
        ".": "not a file",
        "text.png": "not a picture",
        "empty.png": "not a picture",
        "bomb.png": "decompression bomb",
        "small.png": "63 x 200 pixels",
        **{f"cut.{kind}": "truncated|cannot be read" for kind in ("png", "jpg", "tif", "webp", "gif", "bmp")},
    }
    for name, text in wanted.items():
        with pytest.raises(InputError, match=text) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64, 4), np.uint8), r"\[64, 64, 4\]"),
        (np.zeros((64, 63, 3), np.uint8), "63 x 64"),
        (np.zeros((64, 100_000, 3), np.uint8), "too long and thin"),
        (3, "a int"),
    ],
    ids=["float", "4 channels", "small", "thin", "a number"],
)
def test_bad_arrays_are_refused(value: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load_image(value, 768, 448)  # type: ignore[arg-type]


# Sound


def encode(path: Path, samples: np.ndarray, codec: str, rate_hz: int, layout: str, fmt: str | None) -> None:
    """samples [channels, N] float -> a sound file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
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
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)


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
        "zero.wav": "no samples",
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


# Video


def frames_of(count: int, height: int = 64, width: int = 48) -> np.ndarray:
    """Alternating colours, so that every frame can be told from its neighbours."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[0::2], frames[1::2] = (200, 40, 90), (20, 180, 60)
    return frames


def write_video(path: Path, samples: np.ndarray, close: bool = True) -> VideoWriter:
    """In chunks of 28 frames, the last one cut to the sound, as a session hands them out."""
    writer = VideoWriter(path, 64, 48, 25, RATE, "toy model: test")
    for start in range(0, samples.size, 28 * 640):
        sound = samples[start : start + 28 * 640].astype(np.float32)
        writer.write(frames_of(max(1, round(sound.size / 640))), sound)
    if close:
        writer.close()
    return writer


def decode(path: Path) -> tuple[list[av.VideoFrame], np.ndarray]:
    with av.open(str(path)) as container:
        pictures = list(container.decode(video=0))
    with av.open(str(path)) as container:
        sound = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return pictures, np.concatenate(sound)


@pytest.mark.parametrize("samples", [1, 640, 1_600, 8_000, 17_920, 17_921, 17_950, 44_432, 80_000])
def test_the_video_is_as_long_as_its_sound(tmp_path: Path, samples: int) -> None:
    writer = write_video(tmp_path / "a.mp4", tone(samples / RATE, RATE))
    pictures, _ = decode(tmp_path / "a.mp4")
    assert len(pictures) == writer.frames
    assert abs(len(pictures) / 25 - samples / RATE) <= 1 / 25
    assert [picture.time for picture in pictures] == pytest.approx([i / 25 for i in range(len(pictures))])
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.audio[0]
        # The stream's length counts the encoder's 1,024 priming samples, which its edit list hides.
        sound_s = float(stream.duration * stream.time_base) - 1024 / 48_000
    assert abs(sound_s - samples / RATE) <= 1 / 25
    assert playable_s(tmp_path / "a.mp4") == pytest.approx(len(pictures) / 25)


def test_sound_stays_with_the_picture(tmp_path: Path) -> None:
    """A click every half second is heard where it was put, to two milliseconds, at the end too."""
    samples = np.zeros(6 * RATE)
    for start in range(RATE // 2, samples.size, RATE // 2):
        samples[start : start + 160] = 1.6 * tone(0.01, RATE, 1000)
    write_video(tmp_path / "a.mp4", samples)
    _, sound = decode(tmp_path / "a.mp4")
    loud = np.abs(sound) > 0.3
    for start_s in np.arange(0.5, 6, 0.5):
        around = round((start_s - 0.2) * 48_000)
        heard_s = (around + int(np.argmax(loud[around:]))) / 48_000
        assert abs(heard_s - start_s) < 0.002


def test_colours_and_metadata_come_back(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", tone(1, RATE))
    pictures, _ = decode(tmp_path / "a.mp4")
    for picture, expected in zip(pictures, [(200, 40, 90), (20, 180, 60)], strict=False):
        assert np.abs(picture.to_ndarray(format="rgb24")[20, 20].astype(int) - expected).max() <= 4
        assert (picture.color_primaries, picture.colorspace, picture.color_range) == (1, 1, 1)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == "toy model: test"
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.height, video.width, video.pix_fmt) == (64, 48, "yuv420p")
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.count(b"moof") >= 2


def test_what_is_written_plays_before_the_end(tmp_path: Path) -> None:
    """Without a close, all but the last fragment is on disk."""
    writer = write_video(tmp_path / "a.mp4", tone(5, RATE), close=False)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    assert writer.frames == 125
    pictures, _ = decode(tmp_path / "b.mp4")
    assert len(pictures) >= 125 - 8
    writer.close()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_media import RATE, tone, write_video
write_video(Path({path!r}), tone(5, RATE), close=False)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_leaves_plays(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "a.mp4"))
    result = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert result.returncode == -9
    pictures, _ = decode(tmp_path / "a.mp4")
    assert len(pictures) >= 125 - 8


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Inside, a file that grows past `size_bytes` fails as on a full disk, but with EFBIG.

    It holds for the whole process, and pytest's own output may be a file: keep no limit between tests.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_plays(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, 60 * RATE)
    expected = r"cannot be written: File too large; (\d+\.\d\d) s"
    with pytest.raises(OutputError, match=expected) as caught, file_size_limit(30_000):
        write_video(tmp_path / "a.mp4", noise)
    kept_s = playable_s(tmp_path / "a.mp4")
    assert f"{kept_s:.2f} s of video are kept" in str(caught.value)
    pictures, sound = decode(tmp_path / "a.mp4")
    assert 0 < len(pictures) < 60 * 25
    assert len(pictures) / 25 == pytest.approx(kept_s)
    assert abs(sound.size / 48_000 - kept_s) < 0.4


def test_a_disk_that_is_full_from_the_start_keeps_nothing() -> None:
    with pytest.raises(OutputError, match=r"No space left on device; 0\.00 s"):
        write_video(Path("/dev/full"), tone(3, RATE))


def test_a_full_disk_can_show_at_the_end_only(tmp_path: Path) -> None:
    writer = write_video(tmp_path / "a.mp4", tone(3, RATE), close=False)
    limit_bytes = os.path.getsize(tmp_path / "a.mp4") + 10
    with pytest.raises(OutputError, match=r"2\.\d\d s of video are kept"), file_size_limit(limit_bytes):
        writer.close()
    assert len(decode(tmp_path / "a.mp4")[0]) >= 75 - 8


def test_an_existing_file_lives_until_the_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    writer = VideoWriter(path, 64, 48, 25, RATE, "")
    writer.close()
    assert path.read_bytes() == b"old"
    writer = VideoWriter(path, 64, 48, 25, RATE, "")
    writer.write(frames_of(28), tone(1.12, RATE).astype(np.float32))
    writer.close()
    assert playable_s(path) == pytest.approx(1.12)


def test_the_memory_of_writing_does_not_grow(tmp_path: Path) -> None:
    """The process's peak after two minutes more of video, against after the first."""
    writer = VideoWriter(tmp_path / "a.mp4", 64, 48, 25, RATE, "")
    frames, sound = frames_of(28), tone(1.12, RATE).astype(np.float32)

    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    for _ in range(53):
        writer.write(frames, sound)
    before_bytes = resident_bytes()
    for _ in range(107):
        writer.write(frames, sound)
    assert resident_bytes() - before_bytes < 3e6
    writer.close()
    assert playable_s(tmp_path / "a.mp4") == pytest.approx(160 * 1.12)


def test_bad_output_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    wanted = {
        str(tmp_path): "is a folder",
        str(tmp_path / "none" / "a.mp4"): "does not exist",
        str(tmp_path / "file" / "a.mp4"): "not a folder",
        str(tmp_path / "a.avi"): "must end in .mp4",
        "/proc/a.mp4": "cannot be written",
    }
    for path, text in wanted.items():
        with pytest.raises(InputError, match=text):
            check_output(path)
    assert check_output(tmp_path / "a.mp4") == tmp_path / "a.mp4"
    assert not (tmp_path / "a.mp4").exists()


def test_odd_sizes_and_wrong_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="63 x 48"):
        VideoWriter(tmp_path / "a.mp4", 63, 48, 25, RATE, "")
    writer = VideoWriter(tmp_path / "a.mp4", 64, 48, 25, RATE, "")
    with pytest.raises(InputError, match="uint8"):
        writer.write(frames_of(2).astype(np.float32), np.zeros(1280, np.float32))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sound of shape"):
        writer.write(frames_of(2), np.zeros(640 * 4, np.float32))
    assert not (tmp_path / "a.mp4").exists()
    assert math.isclose(playable_s(tmp_path / "a.mp4"), 0)

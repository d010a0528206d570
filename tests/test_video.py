"""Video out: its length, colours and sound, what a kill or a full disk leaves, and every refusal."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import RATE, decode, striped_frames, tone, write_video

from flashtalk_rt.errors import InputError, OutputError
from flashtalk_rt.media import VideoWriter, check_output, playable_s


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
from media_files import RATE, tone, write_video
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


def test_a_disk_that_is_full_from_the_start_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File too large; nothing was kept"), file_size_limit(0):
        write_video(tmp_path / "a.mp4", tone(3, RATE))


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
    writer.write(striped_frames(28), tone(1.12, RATE).astype(np.float32))
    writer.close()
    assert playable_s(path) == pytest.approx(1.12)


def test_the_memory_of_writing_does_not_grow(tmp_path: Path) -> None:
    """The process's peak after two minutes more of video, against after the first."""
    writer = VideoWriter(tmp_path / "a.mp4", 64, 48, 25, RATE, "")
    frames, sound = striped_frames(28), tone(1.12, RATE).astype(np.float32)

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
        str(tmp_path / "file" / "a.mp4"): "cannot be written: Not a directory",
        str(tmp_path / "a.avi"): "must end in .mp4",
        "/proc/a.mp4": "cannot be written",
        str(tmp_path / "x" / ".." / f"{'x' * 300}.mp4"): "does not exist",
        str(tmp_path / f"{'x' * 300}.mp4"): "File name too long",
        str(tmp_path / "loop.mp4"): "symbolic links",
        str(tmp_path / "dangling.mp4"): f"the folder {tmp_path / 'none'} does not exist",
        str(tmp_path / "pipe.mp4"): "a device or a pipe",
    }
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "none" / "a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    for path, text in wanted.items():
        with pytest.raises(InputError, match=text):
            check_output(path)
    assert check_output(tmp_path / "a.mp4") == tmp_path / "a.mp4"
    (tmp_path / "good.mp4").symlink_to(tmp_path / "b.mp4")
    check_output(tmp_path / "good.mp4")
    assert not (tmp_path / "b.mp4").exists()
    assert not (tmp_path / "a.mp4").exists()


def test_odd_sizes_and_wrong_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="63 x 48"):
        VideoWriter(tmp_path / "a.mp4", 63, 48, 25, RATE, "")
    writer = VideoWriter(tmp_path / "a.mp4", 64, 48, 25, RATE, "")
    with pytest.raises(InputError, match="uint8"):
        writer.write(striped_frames(2).astype(np.float32), np.zeros(1280, np.float32))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sound of shape"):
        writer.write(striped_frames(2), np.zeros(640 * 4, np.float32))
    assert not (tmp_path / "a.mp4").exists()
    assert math.isclose(playable_s(tmp_path / "a.mp4"), 0)

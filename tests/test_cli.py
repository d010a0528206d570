"""The `flashtalk` command: what it makes, and what a full disk and stopping it leave.

What needs no network runs as a real process; the rest calls `main`, which is all such a process does.
"""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from command import ROOT, arguments, one_error, pictures, run, start, write_inputs
from media_files import RATE, encode, tone, write_wav
from PIL import Image

from flashtalk_rt.cli import Stop, Stopped, main
from flashtalk_rt.media import VideoWriter, playable_s
from flashtalk_rt.modules import weights


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, face.png and speech.wav (3 s)."""
    return write_inputs(tmp_path_factory.mktemp("shared"))


# What it makes


def test_the_real_command_makes_a_video(shared: Path, tmp_path: Path) -> None:
    code, out, err = run(arguments(shared, tmp_path / "a.mp4"))
    assert (code, err) == (0, "")
    assert re.search(r"75 frames, 3\.00 s of video in .* frames/s; .* s of compute per second of video", out)
    assert len(pictures(tmp_path / "a.mp4")) == 75
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"].startswith("toy model: AI-generated")
        assert (container.streams.video[0].height, container.streams.video[0].width) == (64, 48)


@pytest.mark.parametrize("samples", [1, 500, 4_800, 17_920, 18_000, 36_500])
def test_the_video_lasts_as_long_as_the_sound(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], samples: int
) -> None:
    """From one sample to two chunks and a bit, all of it silence, which is a sound like any other."""
    audio = write_wav(tmp_path / "a.wav", np.zeros(samples))
    assert main(arguments(shared, tmp_path / "a.mp4", audio=audio)) == 0
    made_s = len(pictures(tmp_path / "a.mp4")) / 25
    assert abs(made_s - samples / RATE) <= 1 / 25
    assert f"{made_s:.2f} s of video" in capfd.readouterr().out


def test_other_rates_sizes_and_options(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encode(tmp_path / "a.mp3", np.tile(tone(1.3, 44_100), (2, 1)), "libmp3lame", 44_100, "stereo", None)
    Image.open(shared / "face.png").convert("CMYK").save(tmp_path / "a.jpg")
    options = {"audio": tmp_path / "a.mp3", "image": tmp_path / "a.jpg", "size": "80x64", "steps": "1"}
    made = []
    for seed in ("7", "7", "8"):
        command = arguments(shared, tmp_path / "a.mp4", **options, seed=seed, precision="fp32", device="cpu")
        assert main(command) == 0
        frames = pictures(tmp_path / "a.mp4")
        assert abs(len(frames) / 25 - 1.3) <= 1 / 25
        assert (frames[0].height, frames[0].width) == (80, 64)
        made.append(frames[10].to_ndarray(format="rgb24"))
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    assert capfd.readouterr().err == ""


def test_the_embedded_model_says_that_it_is_a_toy(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "EMBEDDED", shared / "model")
    command = [text for text in arguments(shared, tmp_path / "a.mp4") if text != "--checkpoint"][:-1]
    assert main(command) == 0
    assert main([*command, "--prompt", "A dog."]) == 0
    plain, prompted = [line for line in capfd.readouterr().out.splitlines() if line.startswith("embedded")]
    assert "toy" in plain and "ignored" not in plain
    assert "toy" in prompted and "--prompt is ignored" in prompted


def test_a_terminal_shows_progress_with_speed_and_time_left(shared: Path, tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    command = [sys.executable, "-m", "flashtalk_rt", *arguments(shared, tmp_path / "out.mp4")]
    with subprocess.Popen(command, cwd=ROOT, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert process.returncode == 0
    assert re.search(rb"\d+/75 [\d.]+ frames/s \d:\d\d:\d\d", re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b"", seen))


@pytest.mark.parametrize("closed", [True, False])
def test_nobody_reading_stops_nothing(shared: Path, tmp_path: Path, closed: bool) -> None:
    """`| true`, and stdout on a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flashtalk_rt", *arguments(shared, tmp_path / "a.mp4")]
    with open(writer, "wb") as pipe, open("/dev/full", "wb") as full:
        stdout = pipe if closed else full
        done = subprocess.run(command, check=False, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(pictures(tmp_path / "a.mp4")) == 75


# What a full disk and stopping it leave


def test_a_full_disk_is_one_line_and_what_was_written_plays(shared: Path, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, 20 * RATE))
    out = tmp_path / "a.mp4"
    code, _, err = run(arguments(shared, out, audio=tmp_path / "a.wav"), most_kib=60)
    line = one_error(code, err)
    kept_s = playable_s(out)
    assert str(out) in line and f"{kept_s:.2f} s of video are kept" in line
    assert 0 < kept_s < 20
    assert len(pictures(out)) == round(kept_s * 25)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_made_before_a_signal_plays(shared: Path, tmp_path: Path, number: signal.Signals) -> None:
    write_wav(tmp_path / "a.wav", tone(300, RATE))
    out = tmp_path / "a.mp4"
    process = start(arguments(shared, out, audio=tmp_path / "a.wav"))
    deadline = time.monotonic() + 60
    while not (out.exists() and playable_s(out) > 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    frames = len(pictures(out))
    assert frames > 25
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert err.splitlines() == [f"interrupted: {frames / 25:.2f} s of video are kept in {out}"]


def test_ctrl_c_keeps_every_finished_chunk(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = VideoWriter.write, []

    def and_press(writer: VideoWriter, *values: object) -> None:
        write(writer, *values)  # type: ignore[arg-type]
        written.append(writer.frames)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(VideoWriter, "write", and_press)
    assert main(arguments(shared, tmp_path / "a.mp4")) == 130
    assert written == [28, 56]
    assert capfd.readouterr().err == f"interrupted: 2.24 s of video are kept in {tmp_path / 'a.mp4'}\n"
    assert len(pictures(tmp_path / "a.mp4")) == 56


def test_ctrl_c_before_the_first_frame_keeps_the_older_file(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.mp4"
    out.write_bytes(b"an older video")
    monkeypatch.setattr(weights, "load", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    assert main(arguments(shared, out)) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert capfd.readouterr().err == "interrupted: nothing was written\n"
    assert out.read_bytes() == b"an older video"


def test_a_signal_in_the_midst_of_a_lock_does_not_hang() -> None:
    lock, dropped, stop = threading.Lock(), threading.Event(), Stop()

    def interrupt() -> None:
        with lock:
            dropped.set()

    with stop.caught(), stop.gently(interrupt):
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
        assert dropped.wait(10)
        with pytest.raises(Stopped):
            stop.check()


# The other commands


def test_convert_rewrites_a_folder(shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(shared / "model"), str(tmp_path / "new"), "--precision", "fp32"]) == 0
    assert main(arguments(shared, tmp_path / "a.mp4", checkpoint=tmp_path / "new")) == 0
    for folder, out, options, text in (
        (shared / "model", tmp_path / "new", [], "exists"),
        (tmp_path / "none", tmp_path / "newer", [], "none"),
        (shared / "model", tmp_path / "newer", ["--precision", "fp16"], "fp16"),
        (shared / "model", tmp_path / "newer", ["--precision", "8bit"], "convert to fp8"),
    ):
        capfd.readouterr()
        code = main(["convert", str(folder), str(out), *options])
        assert text in one_error(code, capfd.readouterr().err)


def test_convert_knows_the_embedded_model(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "EMBEDDED", shared / "model")
    assert main(["convert", "embedded", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "flashtalk.json").is_file()


def test_version_help_and_doctor(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"flashtalk \d+\.\d+\.\d+\n", capfd.readouterr().out)
    assert main([]) == 0
    shown = capfd.readouterr().out
    assert [name for name in ("generate", "convert", "doctor", "train") if name not in shown] == []
    assert main(["doctor"]) == 0
    assert "chunk_attention" in capfd.readouterr().out
    assert main(["dance"]) == 2
    assert "dance" in one_error(2, capfd.readouterr().err)


def test_train_hands_its_arguments_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "world-base" in capfd.readouterr().out
    assert main(["train"]) == 2
    shown = capfd.readouterr()
    assert "world-base" in shown.out + shown.err and "error" not in shown.err
    assert main(["train", "nothing"]) == 2
    assert "nothing" in one_error(2, capfd.readouterr().err)

"""`make demo`: the bundled portrait and speech through the real command, and a picture of what came out.

The portrait is identity 27 of the 48 held-out ones that `sample_identities` draws from seed 2, drawn by our
own renderer at 384 x 384 with all motion at 0; the speech is our own text, spoken by espeak-ng with the voice
en-gb-x-gbclan+f1 (22.05 kHz). Training saw neither.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import cli
from .errors import FlashTalkError, InputError
from .media import AudioReader
from .modules.audio import normalize_loudness
from .training.world.face import cavity_height
from .training.world.metrics import pearson
from .training.world.speech import LOUDNESS_LUFS, SAMPLE_RATE_HZ, mouth_truth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ASSETS = Path(__file__).parent / "assets"
PORTRAIT = ASSETS / "portrait.png"
SPEECH = ASSETS / "speech.flac"
SHEET_FRAMES = 8
SHEET_FRAME_PX = 192
SHEET_HEIGHT_PX, TITLE_PX, AXIS_PX, MARGIN_PX = 520, 34, 44, 16
ENVELOPE_HZ = 100


class Measured(NamedTuple):
    """What a video's mouth does, beside what its sound asks for; F frames."""

    frames: npt.NDArray[np.uint8]  # [F, H, W, 3] RGB, decoded
    fps: int
    opening: Tensor  # [F] height of the mouth's cavity as a fraction of the picture's
    truth: Tensor  # [F] in [0, 1], `mouth_truth` of the sound
    r: float  # Pearson's, of the two, at lag 0


def main(argv: Sequence[str] | None = None) -> int:
    """Write demo.mp4 and demo.png to --out-dir (default: here); the exit code is `flashtalk`'s."""
    parser = argparse.ArgumentParser(prog="python -m flashtalk_rt.demo")
    parser.add_argument("--out-dir", type=Path, default=Path("."), help="where demo.mp4 and demo.png go")
    out_dir: Path = parser.parse_args(argv).out_dir
    video, sheet = out_dir / "demo.mp4", out_dir / "demo.png"
    try:
        figure = new_figure()  # before minutes of work: it needs the dev extra
        code = cli.main(["generate", "--image", str(PORTRAIT), "--audio", str(SPEECH), "--out", str(video)])
        if code:
            return code
        samples = np.concatenate(list(AudioReader(SPEECH, SAMPLE_RATE_HZ)))
        measured = measure(video, samples)
        draw(figure, measured, samples)
        figure.savefig(sheet, pil_kwargs={"optimize": True})
    except (FlashTalkError, OSError) as error:
        cli.say(f"error: {error}", to_stderr=True)
        return 2
    cli.say(f"{sheet}: the measured mouth opening follows the speech with r = {measured.r:.3f}")
    return 0


def measure(video: Path, samples: npt.NDArray[np.float32]) -> Measured:
    """Read the mouth off the video's own frames, by colour; samples: its sound, float32 [N] at 16 kHz."""
    with av.open(str(video)) as container:
        fps = round(container.streams.video[0].average_rate or 0)
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = np.array(pictures, np.uint8)
    loud = normalize_loudness(torch.from_numpy(samples), SAMPLE_RATE_HZ, LOUDNESS_LUFS)
    truth = mouth_truth(loud, SAMPLE_RATE_HZ, fps)[:, 0]
    opening = cavity_height(torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1)
    whole = min(len(truth), len(opening))  # the last frame may show a part of one frame's sound
    opening, truth = opening[:whole], truth[:whole]
    return Measured(frames[:whole], fps, opening, truth, pearson(opening, truth).item())


def new_figure() -> Figure:
    """An empty sheet; InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "the sheet needs matplotlib; install the dev extra (pip install -e '.[dev]')"
        ) from None
    size_px = (SHEET_FRAMES * SHEET_FRAME_PX + 2 * MARGIN_PX, SHEET_HEIGHT_PX)
    return Figure(figsize=(size_px[0] / 100, size_px[1] / 100), dpi=100)


def draw(figure: Figure, measured: Measured, samples: npt.NDArray[np.float32]) -> None:
    """Frames above their moments on the time axis of the plot: the sound filled, the mouth drawn over it."""
    frames, fps = measured.frames, measured.fps
    length_s = len(frames) / fps
    width_px = SHEET_FRAMES * SHEET_FRAME_PX + 2 * MARGIN_PX
    strip_px = SHEET_FRAME_PX * frames.shape[1] / frames.shape[2]

    def place(left: float, bottom: float, width: float, height: float) -> Axes:
        """Axes at a rectangle in pixels from the sheet's lower left corner."""
        corner = (left / width_px, bottom / SHEET_HEIGHT_PX)
        return figure.add_axes((*corner, width / width_px, height / SHEET_HEIGHT_PX))

    # The middles of equal parts of the time axis, which is as wide as the strip of frames.
    moments_s = [(i + 0.5) * length_s / SHEET_FRAMES for i in range(SHEET_FRAMES)]
    strip_bottom = SHEET_HEIGHT_PX - TITLE_PX - strip_px
    for i, moment_s in enumerate(moments_s):
        left = MARGIN_PX + i * SHEET_FRAME_PX + 1
        picture = place(left, strip_bottom, SHEET_FRAME_PX - 2, strip_px)
        picture.imshow(frames[int(moment_s * fps)], interpolation="lanczos", aspect="auto")
        picture.set_axis_off()

    plot = place(MARGIN_PX, AXIS_PX, width_px - 2 * MARGIN_PX, strip_bottom - 8 - AXIS_PX)
    block = SAMPLE_RATE_HZ // ENVELOPE_HZ
    blocks = samples[: len(samples) // block * block].reshape(-1, block)
    envelope = np.abs(blocks).max(1)
    clock_s = (np.arange(len(envelope)) + 0.5) / ENVELOPE_HZ
    plot.fill_between(clock_s, envelope / peak(envelope), color="#c9d6e6", lw=0, label="audio envelope")
    clock_s = (np.arange(len(frames)) + 0.5) / fps
    opening = measured.opening.numpy()
    plot.plot(clock_s, opening / peak(opening), color="#b3123f", lw=2, label="mouth opening in the frames")
    for moment_s in moments_s:
        plot.axvline(moment_s, color="0.55", lw=0.8, ls=":")
    plot.set(
        xlim=(0, length_s), ylim=(0, 1.2), yticks=[], xlabel="seconds (each curve is scaled to its peak)"
    )
    plot.legend(loc="upper right", ncols=2, frameon=False)
    title = (
        f"The mouth's opening, measured in the video, follows the speech with r = {measured.r:.3f} at lag 0"
    )
    figure.text(0.5, 1 - 0.68 * TITLE_PX / SHEET_HEIGHT_PX, title, ha="center", fontsize=14)


def peak(values: npt.NDArray[np.float32]) -> float:
    """What to divide by so that the largest becomes 1; silence stays 0."""
    return max(float(values.max()), 1e-9)


if __name__ == "__main__":
    sys.exit(main())

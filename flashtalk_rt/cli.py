"""The `flashtalk` command.

Exit codes: 0 done; 2 something given cannot be used or written, with one `error:` line; 128 + n stopped
by signal n (130 for Ctrl-C, 143 for SIGTERM), with a line that says what was kept.

Everything cheap is checked before torch is imported, and everything given before the output is touched.
"""

from __future__ import annotations

import io
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from . import __version__
from .config import let_threads_sleep
from .errors import FlashTalkError, InputError
from .files import check_input
from .options import (
    PRECISION_HELP,
    check_device,
    check_device_name,
    check_settings,
    dtype_of,
    parse_precision,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

    from .config import StreamConfig
    from .media import AudioReader, VideoWriter
    from .runtime import Chunk, Session

FILE_COLUMNS = 160  # of a table that goes to no terminal: what the widest takes
DEFAULT_PROMPT = "A person is talking."
TOY_NOTICE = (
    "embedded model: a toy that animates drawn cartoon faces only; give --checkpoint FOLDER for photographs"
)
# A command that is declared in a module of its own, imported only when it is used.
DELEGATED: Any = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
# Every usage error of typer; its other names moved between typer's releases.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="flashtalk", help="A talking video from one portrait and speech.", add_completion=False
)


class Stopped(BaseException):
    """A stop signal arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stop:
    """Ctrl-C and SIGTERM: they raise `Stopped` at once, or, inside `gently`, when the work allows it.

    `kept` is for the user: what is left of the work.
    """

    def __init__(self) -> None:
        self.kept = ""
        self._ask: Callable[[], None] | None = None
        self._number = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def gently(self, ask: Callable[[], None]) -> Iterator[None]:
        """Inside, the first signal calls `ask` and `check` raises; a second one raises at once."""
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def check(self) -> None:
        if self._number:
            raise Stopped(self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ask is None or self._number:
            raise Stopped(number)
        self._number = number
        # On a thread: `ask` takes locks, which the code that the signal stopped may hold.
        threading.Thread(target=self._ask, daemon=True).start()


def entry() -> int:
    """The process that is the command."""
    let_threads_sleep()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (the process's own by default) and return its exit code."""
    stop = Stop()
    try:
        with stop.caught():
            command = typer.main.get_command(app)
            code = command.main(
                None if argv is None else list(argv), prog_name="flashtalk", obj=stop, standalone_mode=False
            )
            return code if isinstance(code, int) else 0
    except Exception as error:
        text = complaint(error)
        if text is None:
            raise
        if text:
            say(f"error: {' '.join(text.split())}", to_stderr=True)
        return 2
    except Stopped as stopped:
        say(f"interrupted{': ' if stop.kept else ''}{stop.kept}", to_stderr=True)
        return 128 + stopped.number


def complaint(error: Exception) -> str | None:
    """What to tell the user of `error`, "" where the help was shown instead; None for a bug of ours."""
    if isinstance(error, UsageError):
        return str(error.format_message())  # type: ignore[attr-defined]
    if isinstance(error, FlashTalkError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path, its permissions and its disk"
    # torch's are RuntimeErrors, with texts of several lines.
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        return (
            f"out of memory{f', asking for {asked[1]} more' if asked else ''}; "
            "take a smaller --size, or a device that has more"
        )
    return None


def say(text: str, to_stderr: bool = False) -> None:
    """One line, as it is: no wrapping, no markup (paths hold brackets).

    Where nobody reads it any more, or its disk is full, it is dropped: that is no reason to stop the work.
    """
    try:
        typer.echo(text.encode(errors="backslashreplace").decode(), err=to_stderr)
    except OSError:
        # What the stream still holds goes there too, else Python fails at its end.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, (sys.stderr if to_stderr else sys.stdout).fileno())
        os.close(null)


def show(what: RenderableType) -> None:
    """A table, with the colours and the width that stdout shows; none of a file's is cut."""
    from rich.console import Console

    text = io.StringIO()
    terminal = Console().is_terminal
    width = None if terminal else FILE_COLUMNS
    Console(file=text, force_terminal=terminal or None, width=width).print(what)
    say(text.getvalue().rstrip("\n"))


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        say(f"flashtalk {__version__}")
    elif context.invoked_subcommand is None:
        say(context.get_help())


@app.command()
def generate(
    context: typer.Context,
    image: Annotated[Path, typer.Option(help="The portrait: any picture Pillow reads.")],
    audio: Annotated[Path, typer.Option(help="The speech: any sound FFmpeg reads.")],
    out: Annotated[Path, typer.Option(help="The video, .mp4; overwritten once the first frames are made.")],
    checkpoint: Annotated[str, typer.Option(help="A model folder, published or converted.")] = "embedded",
    prompt: Annotated[str | None, typer.Option(help=f'Default: "{DEFAULT_PROMPT}"')] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same video.")] = 0,
    size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH, as 768x448, each divisible by 16. Default: the model's."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help=f"{PRECISION_HELP} Default: by device.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
) -> None:
    """Make a talking video, as long as the speech.

    The file plays at any moment: after Ctrl-C or a kill it holds what was made until then.
    """
    stop = cast(Stop, context.obj)
    stop.kept = "nothing was written"
    height, width, chosen = check_settings(size, steps, precision)
    check_device_name(device)
    from .media import AudioReader, VideoWriter, check_output
    from .modules.image import open_image

    check_output(out)
    for name, given in (("image", image), ("audio", audio)):
        check_input(given, name)
        if out.exists() and out.samefile(given):
            raise InputError(f"--out {out} is the --{name} file itself; name another file")
    portrait = open_image(image)
    reader = AudioReader(audio)
    samples = reader.scan()
    from .modules.weights import load
    from .runtime import Engine

    check_device(device)
    model = load(checkpoint, device, None if chosen is None else dtype_of(chosen))
    if model.label:  # also of the embedded model when it was converted
        say(TOY_NOTICE + ("; --prompt is ignored, it knows no text" if prompt is not None else ""))
    engine = Engine(model, steps, chosen, height, width)
    session = engine.session(portrait, DEFAULT_PROMPT if prompt is None else prompt, seed)
    model.release_encoders()  # this is the only session
    stream = model.stream
    comment = f"{model.label + ': ' if model.label else ''}AI-generated video, flashtalk {__version__}"
    writer = VideoWriter(out, engine.height, engine.width, stream.fps, stream.sample_rate_hz, comment)
    started = time.perf_counter()
    try:
        with writer, stop.gently(session.interrupt), progress_bar(samples, stream) as bar:
            stream_through(reader, session, writer, bar, stop)
    finally:
        video_s = writer.frames / stream.fps
        if video_s:
            stop.kept = f"{video_s:.2f} s of video are kept in {out}"
    compute_s = time.perf_counter() - started
    say(
        f"{out}: {writer.frames} frames, {video_s:.2f} s of video in {compute_s:.1f} s "
        f"({writer.frames / compute_s:.1f} frames/s; {compute_s / video_s:.2f} s of compute "
        "per second of video)"
    )


def stream_through(
    reader: AudioReader, session: Session, writer: VideoWriter, bar: Progress, stop: Stop
) -> None:
    """Audio in, frames out, a block at a time; raises Stopped between chunks."""

    def drain() -> None:
        for chunk in session:
            write_chunk(writer, chunk)
            bar.advance(bar.task_ids[0], len(chunk.frames))
            stop.check()
        stop.check()

    for block in reader:
        session.push_audio(block)
        drain()
    session.end_audio()
    drain()
    session.close()


def write_chunk(writer: VideoWriter, chunk: Chunk) -> None:
    writer.write(chunk.frames.numpy(), chunk.audio.numpy())


def progress_bar(samples: int, stream: StreamConfig) -> Progress:
    """A bar on stderr over the frames that `samples` will give; hidden where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class FramesPerSecond(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("-- frames/s" if speed is None else f"{speed:.1f} frames/s")

    console = Console(stderr=True)
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        FramesPerSecond(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=120.0,  # a chunk can take many seconds
    )
    bar.add_task("frames", total=max(1, math.ceil(samples / stream.samples_per_frame)))
    return bar


@app.command()
def convert(
    folder: Annotated[str, typer.Argument(help='A model folder, published or converted, or "embedded".')],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    precision: Annotated[str, typer.Option(help="Of the DiT: fp32 or bf16 or fp8.")] = "bf16",
) -> None:
    """Rewrite a checkpoint folder as safetensors that load fast and hold everything needed."""
    if precision == "8bit":
        raise InputError(
            "--precision is 8bit, whose weights are those of fp8: convert to fp8, and generate in 8bit"
        )
    chosen = parse_precision(precision, ("fp32", "bf16", "fp8"))
    from .modules.convert import convert as rewrite

    rewrite(folder, out, dtype_of(chosen), fp8=chosen == "fp8")
    say(f"{out}: written in {chosen}")


@app.command()
def doctor() -> None:
    """What this machine has, which backend serves each operator, and why the others were refused."""
    from .doctor import report
    from .ops import REGISTRY

    show(report(REGISTRY))


@app.command(**DELEGATED)
def bench(context: typer.Context) -> None:
    """Time the 14B model beside its budgets: `flashtalk bench --help`."""
    from .bench.command import app as command

    delegate(context, command, "bench")


@app.command(**DELEGATED)
def profile(context: typer.Context) -> None:
    """Trace one chunk, and show its time by stage and kernel: `flashtalk profile --help`."""
    from .profile import app as command

    delegate(context, command, "profile")


@app.command(**DELEGATED)
def train(context: typer.Context) -> None:
    """Train: `flashtalk train --help` lists the stages."""
    from .training.world.commands import app as stages

    delegate(context, stages, "train")


def delegate(context: typer.Context, command: typer.Typer, name: str) -> None:
    """Hand the rest of the command line to a command whose module brings torch."""
    typer.main.get_command(command).main(
        context.args, prog_name=f"flashtalk {name}", obj=context.obj, standalone_mode=False
    )

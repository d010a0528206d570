"""How many milliseconds an interrupt takes, of a model whose steps take long enough to tell."""

from __future__ import annotations

import dataclasses
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from streams import CHUNK, on_latent_frame, portrait, push, speech

from flashtalk_rt.bench.models import random_dit
from flashtalk_rt.runtime import Engine, Session
from flashtalk_rt.runtime.stages import Stages

STEPS = {"cpu": 48, "cuda": 12}
INTERRUPTS = 20
# Beyond the step: the interpreter's thread switch (5 ms), launches, a host that others share.  On the GPU
# it is shorter than a step, so two steps are too long.
SLACK_MS = {"cpu": 200.0, "cuda": 25.0}
# 1.0 B parameters: by its operations (21 TFLOP at 512 x 512, 9,216 tokens) some 40 ms a step on an H100.
LARGE = dataclasses.replace(tiny.DIT, dim=2048, ffn_dim=8192, num_heads=16, num_layers=12)


def make_engine(device: str) -> Engine:
    """On the GPU with steps of milliseconds; on the CPU the tiny model's take them too."""
    if device == "cpu":
        return Engine(tiny.model(), steps=STEPS[device], precision="fp32", height=64, width=64)
    model = tiny.model()
    model.dit = random_dit(LARGE, torch.device(device), torch.bfloat16)
    model.vae.to(device)
    return Engine(model, steps=STEPS[device], precision="bf16", height=512, width=512)


class Watch:
    """When each step of the running chunk began, how long it took, and when its decoding began."""

    def __init__(self, stages: Stages) -> None:
        self.device = stages._latent.device
        self.began: list[float] = []  # seconds, of every step since `forget`
        self.decoding: float | None = None  # likewise
        self.queued: list[float] = []  # when each latent frame was given to the device, or done on a CPU
        self._moments: list[list[Any]] = []
        stages._steps = [self._watched(step) for step in stages._steps]
        decode = stages._decode_all

        def decode_all(*args: Any) -> bool:
            self.decoding = time.perf_counter()
            return decode(*args)

        stages._decode_all = decode_all  # type: ignore[method-assign]
        on_latent_frame(stages, lambda _: self.queued.append(time.perf_counter()))

    def forget(self) -> None:
        self.began, self._moments, self.decoding, self.queued = [], [], None, []

    def steps_ms(self) -> list[float]:
        """How long the steps took, on the clock of the device that ran them; other processes' turns on it,
        which tests in parallel bring about, are within."""
        if self.device.type == "cpu":
            return [(end - begin) * 1e3 for begin, end in self._moments]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in self._moments]

    def _watched(self, step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self.began.append(time.perf_counter())
            begin = self._moment()
            step()
            self._moments.append([begin, self._moment()])

        return run

    def _moment(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclasses.dataclass(frozen=True)
class Interrupt:
    """One interrupt: in seconds, when it was asked for and when the iterating thread had control again."""

    asked: float
    returned: float


def interrupt_after(session: Session, delay_s: float) -> Interrupt:
    """Iterate here, interrupt from another thread after `delay_s`."""
    asked: list[float] = []

    def interrupt() -> None:
        asked.append(time.perf_counter())
        session.interrupt()

    timer = threading.Timer(delay_s, interrupt)
    timer.start()
    for _ in session:
        pass
    returned = time.perf_counter()
    timer.join()
    return Interrupt(asked[0], returned)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.alone),
        pytest.param("cuda", marks=(pytest.mark.gpu, pytest.mark.alone)),
    ]
)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = make_engine(request.param)
    yield made
    made.close()


def test_an_interrupt_hands_back_control_within_a_step(engine: Engine, figures: dict[str, Any]) -> None:
    """Asked for at random moments of a chunk, with speech queued for many more: while a chunk is denoised,
    control is back when the step under way ends.  Before its first step there is the audio to wait for too.
    While it is decoded no latent frame is begun but the one at hand."""
    session = engine.session(portrait())
    push(session, speech(CHUNK))  # which captures
    assert engine._stages is not None
    watch = Watch(engine._stages)
    slack_ms = SLACK_MS[engine.device.type]
    draw = random.Random(0)
    whole_ms, tails_ms, steps_ms, waits_ms, late_ms = [], [], [], [], []
    for _ in range(3):
        watch.forget()
        begin = time.perf_counter()
        assert len(push(session, speech(CHUNK))) == 1
        end = time.perf_counter()
        assert watch.decoding is not None and len(watch.began) == engine.steps
        whole_ms.append((end - begin) * 1e3)
        tails_ms.append((end - watch.decoding) * 1e3)
        steps_ms += watch.steps_ms()
    for _ in range(INTERRUPTS):
        watch.forget()
        session.push_audio(speech(4 * CHUNK))
        found = interrupt_after(session, draw.random() * statistics.median(whole_ms) / 1e3)
        assert list(session) == [], "what was queued was dropped"
        took_ms = watch.steps_ms()
        steps_ms += took_ms
        assert sum(began > found.asked for began in watch.began) <= 1
        if watch.decoding is not None and watch.decoding > watch.began[-1]:
            # Too late for the steps' question: all of them had run.
            assert (watch.decoding - found.asked) * 1e3 < slack_ms
            late_ms.append((found.returned - found.asked) * 1e3)
            assert sum(queued > found.asked for queued in watch.queued) <= 1
        else:
            first = watch.began[
                (len(took_ms) - 1) // engine.steps * engine.steps
            ]  # of the chunk that was dropped
            waits_ms.append((found.returned - max(found.asked, first)) * 1e3)
            assert waits_ms[-1] < took_ms[-1] + slack_ms
    assert waits_ms, "most of a chunk is denoising"
    assert max(late_ms, default=0) < max(tails_ms) + slack_ms
    figures[f"interrupt_{engine.device.type}"] = {
        "step_ms": round(statistics.median(steps_ms), 2),
        "longest_step_ms": round(max(steps_ms), 2),
        "slack_ms": slack_ms,
        "denoising_ms": [round(x, 2) for x in sorted(waits_ms)],
        "decode_and_encode_ms": round(statistics.median(tails_ms), 2),
        "decoding_ms": [round(x, 2) for x in sorted(late_ms)],
    }

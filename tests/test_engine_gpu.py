"""The engine's stages captured as CUDA graphs: the eager bits, flat memory, prompt interrupts.

How many milliseconds an interrupt takes is test_interrupt_gpu.py's.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import Inputs, plain_chunk, run_chunk
from streams import CHUNK, frames_of, gpu_model, portrait, push, small_engine, speech
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashtalk_rt.bench.models import random_dit, random_model
from flashtalk_rt.config import FLOAT8, DiTConfig, StreamConfig, VAEConfig
from flashtalk_rt.graphs.capture import release_memory
from flashtalk_rt.ops import _dispatch
from flashtalk_rt.runtime import Engine

chunk_attention = importlib.import_module("flashtalk_rt.ops.chunk_attention")  # not the function
slice_conv = importlib.import_module("flashtalk_rt.ops.slice_conv")
# What a chunk must be made of where the kernels of `csrc` are there: those, and the absorbed audio form.
WIDE_OPS = {
    "flashtalk_rt::dual_cross_attention_cuda",
    "flashtalk_rt::slice_conv",
    "flashtalk_rt::head_products",
    "flashtalk_rt::grouped_softmax",
}
FP8_OPS = {"flashtalk_rt::quantize", "aten::_scaled_mm"}
ALLOWED_GROWTH_MB = 20.0
GPU = torch.device("cuda")


class Names(TorchDispatchMode):
    """The names of all ops called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu_engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines of `gpu_model`; closed after the test, whose graphs do not outlive it, however it
    ends."""
    with contextlib.ExitStack() as made:

        def make(wide: bool = False, **settings: Any) -> Engine:
            engine = Engine(gpu_model(wide), **settings)
            made.callback(engine.close)
            return engine

        yield make
    gc.collect()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_captured_equals_eager_bit_for_bit(
    steps: int, precision: Any, gpu_engine: Callable[..., Engine]
) -> None:
    audio = speech(3 * CHUNK)
    results = []
    for capture in (True, False):
        engine = gpu_engine(steps=steps, precision=precision, height=64, width=48, capture=capture)
        results.append(frames_of(push(engine.session(portrait(), seed=3), audio)))
        assert engine._stages is not None and len(engine._stages.graphs) == (steps + 13 if capture else 0)
        engine.close()
    assert torch.equal(*results)


@pytest.fixture
def no_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no FlashAttention were installed, which would take our kernel's place."""
    monkeypatch.setattr(chunk_attention, "importable", lambda name: False)
    _dispatch._backend_for.cache_clear()
    yield
    _dispatch._backend_for.cache_clear()


@pytest.mark.gpu
def test_captured_equals_eager_with_flash_attention_4(gpu_engine: Callable[..., Engine]) -> None:
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 (extra: fa4) is not installed")
    assert _dispatch.backend_for(chunk_attention.SPEC, GPU, torch.bfloat16, 128) == "fa4"
    results = []
    for capture in (True, False):
        engine = gpu_engine(wide=True, steps=2, precision="bf16", height=64, width=64, capture=capture)
        results.append(frames_of(push(engine.session(portrait(), seed=3), speech(3 * CHUNK))))
        engine.close()
    assert torch.equal(*results)
    assert results[0].float().std() > 10


@pytest.mark.gpu
@pytest.mark.usefixtures("no_flash")
@pytest.mark.parametrize("precision", ["bf16", *FLOAT8])
@pytest.mark.parametrize("steps", [1, 4])
def test_captured_equals_eager_with_every_kernel(
    steps: int, precision: Any, gpu_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 128 and the VAE's published widths, where the CUDA kernels of `csrc`, the absorbed audio form
    and (fp8) the float8 products take part."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels of csrc are sm_90's")
    assert not isinstance(slice_conv.extension(), str), slice_conv.extension()
    # They win at sizes that take a thousand times longer.
    sizes = dict.fromkeys(slice_conv.MEASURED_FASTER, (1, math.inf))
    monkeypatch.setattr(slice_conv, "MEASURED_FASTER", sizes)
    audio = speech(3 * CHUNK)
    results = []
    for capture in (True, False):
        engine = gpu_engine(wide=True, steps=steps, precision=precision, height=64, width=64, capture=capture)
        session = engine.session(portrait(), seed=3)
        with Names() if not capture else contextlib.nullcontext() as names:
            results.append(frames_of(push(session, audio)))
        engine.close()
    assert names is not None
    attention = "quantized_attention" if precision == "8bit" else "chunk_attention_cuda"
    wanted = WIDE_OPS | {f"flashtalk_rt::{attention}"} | (FP8_OPS if precision in FLOAT8 else set())
    assert not wanted - names.seen
    assert torch.equal(*results)
    assert results[0].float().std() > 10, "pictures, not a constant that NaN makes"


@pytest.mark.gpu
def test_captured_is_the_plain_loop(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=2, precision="bf16", height=64, width=48)
    inputs = Inputs(engine)
    motion, windows = inputs.constants.first_motion.float(), inputs.windows()
    made = run_chunk(engine, inputs, motion, windows, 0)
    expected = plain_chunk(engine, inputs.constants, motion, windows, inputs.noise(0))
    assert torch.equal(made.latent, expected[0])


@pytest.mark.gpu
def test_a_new_picture_prompt_or_seed_captures_nothing(
    monkeypatch: pytest.MonkeyPatch, gpu_engine: Callable[..., Engine]
) -> None:
    engine = gpu_engine(steps=2, precision="bf16", height=64, width=48)
    push(engine.session(portrait(0), prompt="a", seed=0), speech(CHUNK))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    sessions = [engine.session(portrait(i), prompt="b" * i, seed=i) for i in range(3)]
    alternating = [[], [], []]  # type: list[list[Chunk]]
    for turn in range(2):
        for i, session in enumerate(sessions):
            alternating[i] += push(session, speech(CHUNK, seed=10 * i + turn))
    for i in range(3):
        alone = engine.session(portrait(i), prompt="b" * i, seed=i)
        expected = push(alone, *(speech(CHUNK, seed=10 * i + turn) for turn in range(2)))
        assert torch.equal(frames_of(alternating[i]), frames_of(expected))


def resident_mb() -> float:
    """The process's resident memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.parametrize(
    ("device", "warm", "chunks"), [("cpu", 20, 100), pytest.param("cuda", 100, 1000, marks=pytest.mark.gpu)]
)
def test_a_thousand_chunks_at_flat_memory(
    device: str, warm: int, chunks: int, request: pytest.FixtureRequest, figures: dict[str, Any]
) -> None:
    """With speech queued one chunk ahead, which is heard ahead; the GPU's memory to the byte."""
    if device == "cpu":  # on which nothing overlaps, so nothing is heard ahead by itself
        engine = small_engine()
        engine.hears_ahead = True
    else:
        engine = request.getfixturevalue("gpu_engine")(steps=1, precision="bf16", height=64, width=48)
    session = engine.session(portrait())
    audio = speech(CHUNK)
    session.push_audio(audio)
    resident, held_bytes = [], []
    for chunk in range(1, chunks + 1):
        session.push_audio(audio)
        assert next(iter(session)).index == chunk - 1
        assert session._ahead is not None, "the next chunk was heard while this one was made"
        if chunk in (warm, chunks):
            gc.collect()
            resident.append(resident_mb())
            if device == "cuda":
                torch.cuda.synchronize()
                held_bytes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    figures[f"resident_mb_after_{warm}_and_{chunks}_chunks_{device}"] = [round(mb, 1) for mb in resident]
    assert resident[1] - resident[0] < ALLOWED_GROWTH_MB
    assert device == "cpu" or held_bytes[0] == held_bytes[1]


@pytest.mark.gpu
def test_engines_one_after_the_other_leave_no_memory_behind(figures: dict[str, Any]) -> None:
    """cuBLAS keeps 34 MB for every stream that it ran on, so not none at all."""
    reserved_mb = []
    for _ in range(3):
        model = random_model(
            torch.device("cuda"), DiTConfig(num_layers=2), VAEConfig(), StreamConfig(height=256, width=256)
        )
        engine = Engine(model, steps=1, precision="bf16")
        session = engine.session(portrait())
        assert len(push(session, speech(CHUNK), speech(CHUNK, seed=1))) == 2
        engine.close()
        del model, engine, session
        gc.collect()
        torch.cuda.empty_cache()
        reserved_mb.append(torch.cuda.memory_reserved() / 1e6)
    figures["reserved_mb_after_each_of_three_engines"] = [round(mb) for mb in reserved_mb]
    assert reserved_mb[2] - reserved_mb[0] <= 150


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [True, False])
def test_weights_leave_no_holes_in_memory(fp8: bool) -> None:
    """Where they replace others: in float8 without `release`, 0.2 GB of two layers were held for nothing."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    dit = random_dit(DiTConfig(num_layers=2), device, torch.bfloat16)
    dit.prepare(torch.bfloat16, fp8=fp8, release=release_memory)
    held = torch.cuda.memory_reserved() - before
    used = sum(tensor.nbytes for tensor in dit.state_dict().values())
    assert held <= 1.02 * used + 40 * 2**20, "torch shares blocks of 20 MiB among smaller tensors"


@pytest.mark.gpu
@pytest.mark.alone
def test_frames_leave_before_the_decode_ends(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=1, precision="fp32", height=768, width=448)
    session = engine.session(portrait())
    push(session, speech(CHUNK))
    (chunk,) = push(session, speech(CHUNK, seed=1))
    ms = chunk.timings_ms
    assert chunk.frames.is_pinned()
    assert ms["first_frame"] < ms["last_frame"] - ms["vae_decode"] / 2


@pytest.mark.gpu
def test_an_interrupt_waits_for_one_step_at_most(gpu_engine: Callable[..., Engine]) -> None:
    engine = gpu_engine(steps=50, precision="fp32", height=256, width=256)
    session = engine.session(portrait())
    push(session, speech(CHUNK))  # captured
    assert engine._stages is not None
    replays = 0
    steps = engine._stages._steps

    def counted(step: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            nonlocal replays
            replays += 1
            if replays == 7:
                session.interrupt()
            step()

        return replay

    engine._stages._steps = [counted(step) for step in steps]
    session.push_audio(speech(CHUNK))
    assert list(session) == [] and replays == 7


@pytest.mark.gpu
def test_released_encoders_give_their_memory_back(gpu_engine: Callable[..., Engine]) -> None:
    """Once a session has started, and been captured: graphs hold what they read, which encoders are not."""
    engine = gpu_engine(steps=1, precision="bf16", height=64, width=48)
    held_bytes = 1 << 28
    for encoder in (engine.model.text_encoder, engine.model.image_encoder):
        vars(encoder)["ballast"] = torch.empty(held_bytes // 2, dtype=torch.uint8, device=GPU)
    del encoder
    session = engine.session(portrait())
    assert len(push(session, speech(CHUNK))) == 1
    before_bytes = torch.cuda.memory_allocated()
    engine.model.release_encoders()
    assert before_bytes - torch.cuda.memory_allocated() >= held_bytes
    assert len(push(session, speech(CHUNK))) == 1


@pytest.mark.gpu
def test_two_engines_capture_in_two_threads(gpu_engine: Callable[..., Engine]) -> None:
    engines = [gpu_engine(steps=2, precision="bf16", height=64, width=48) for _ in range(2)]
    sessions = [engine.session(portrait(), seed=3) for engine in engines]
    made: dict[int, Tensor] = {}

    def work(i: int) -> None:
        made[i] = frames_of(push(sessions[i], speech(2 * CHUNK)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(made[0], made[1])

"""Whether what the measured tables choose is the faster here: `pytest --benchmark tests/benchmarks`.

The tables are `MEASURED_TFLOPS` of chunk_attention, `MEASURED_FASTER` of slice_conv and `MEASURED_MS` of
audio_cross_attention; dual_cross_attention prefers CUDA where it fits.  What is measured goes to
profiles/results/choices-*.json.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.config import DiTConfig, StreamConfig
from flashtalk_rt.modules.dit_layers import AudioCrossAttention
from flashtalk_rt.ops._dispatch import Situation
from flashtalk_rt.profiles import work
from flashtalk_rt.profiles.record import environment, slug, write_result
from flashtalk_rt.profiles.timing import measure

chunk_attention = importlib.import_module("flashtalk_rt.ops.chunk_attention")  # not the function
dual_cross_attention = importlib.import_module("flashtalk_rt.ops.dual_cross_attention")
slice_conv = importlib.import_module("flashtalk_rt.ops.slice_conv")
audio_attention = importlib.import_module("flashtalk_rt.ops.audio_cross_attention")

RESULTS = Path(__file__).parents[2] / "profiles" / "results"
DEVICE = torch.device("cuda")
TOLERANCE = 1.03  # of the fastest: two that are as fast change places
SETTLE_MS = 300.0
SIZES = ((768, 448), (720, 416))
# Of each convolution in `MEASURED_FASTER` the frames, height and width of the first and of a later latent
# frame of 768 x 448.
CONVOLUTIONS = {
    (96, 96, 3, 3): ((1, 768, 448), (4, 768, 448)),
    (96, 192, 3, 3): ((1, 384, 224), (4, 384, 224)),
    (192, 192, 3, 3): ((1, 384, 224), (4, 384, 224)),
    (192, 384, 3, 3): ((1, 192, 112), (2, 192, 112)),
    (384, 384, 3, 3): ((1, 96, 56), (1, 192, 112), (2, 192, 112)),
    (384, 768, 3, 1): ((1, 96, 56),),
}

pytestmark = [pytest.mark.gpu, pytest.mark.latency, pytest.mark.timeout(300)]


def time_ms(call: Callable[[], object], repeats: int = 20) -> float:
    return measure(call, DEVICE, repeats=repeats, settle_ms=SETTLE_MS).median_ms


def keep(name: str, rows: list[dict[str, Any]]) -> None:
    """Beside what the other tests of this file measured on this device."""
    made = environment(DEVICE)
    path = RESULTS / f"choices-{slug(made['device'])}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("commit") != made["commit"]:
        kept = made
    write_result(path, {**kept, name: rows})


def attention_backends(grad: bool) -> list[str]:
    """Of those that serve the 14B model's heads here, in the order of the table; not torch's own choice."""
    situation = Situation.of(DEVICE, torch.bfloat16, 128, grad, False)
    serving = [
        backend.name for backend in chunk_attention.SPEC.backends if backend.supports(situation) is None
    ]
    return [name for name in serving if name != "sdpa"]


@pytest.mark.parametrize("heads", [40, 10, 5])
def test_attention(heads: int) -> None:
    tokens = work.tokens(StreamConfig())
    with torch.inference_mode():
        q, k, v = (torch.randn(1, tokens, heads, 128, device=DEVICE).bfloat16() for _ in range(3))
        found = {
            name: time_ms(lambda name=name: ops.chunk_attention(q, k, v, backend=name))
            for name in attention_backends(grad=False)
        }
    keep(f"attention of {heads} heads, forward, ms", [found])
    assert next(iter(found.values())) <= TOLERANCE * min(found.values()), found


@pytest.mark.parametrize("chunk_tokens", [None, 1344 * 3])
def test_attention_with_gradients(chunk_tokens: int | None) -> None:
    """Forward and backward, unmasked and in chunks of three latent frames."""
    tokens = work.tokens(StreamConfig())
    q, k, v = (torch.randn(1, tokens, 40, 128, device=DEVICE).bfloat16().requires_grad_() for _ in range(3))
    gradient = torch.randn_like(q)

    def both(name: str) -> None:
        out = ops.chunk_attention(q, k, v, chunk_tokens, backend=name)
        torch.autograd.grad(out, (q, k, v), gradient)

    found = {name: time_ms(lambda name=name: both(name), 10) for name in attention_backends(grad=True)}
    keep(f"attention of 40 heads, chunks of {chunk_tokens}, forward and backward, ms", [found])
    assert next(iter(found.values())) <= TOLERANCE * min(found.values()), found


def test_attention_to_text_and_image() -> None:
    """The CUDA kernel, which is preferred where it fits, and Triton's, on the 14B model's call."""
    spec = dual_cross_attention.SPEC
    assert spec.workload is not None
    with torch.inference_mode():
        inputs = spec.workload.make(DEVICE, torch.bfloat16, torch.Generator(DEVICE).manual_seed(0))
        found = {
            name: time_ms(lambda name=name: ops.dual_cross_attention(**inputs, backend=name))
            for name in ("cuda", "triton")
        }
    keep("dual_cross_attention, ms", [found])
    assert found["cuda"] <= TOLERANCE * found["triton"], found


def test_slice_convolutions() -> None:
    assert CONVOLUTIONS.keys() == slice_conv.MEASURED_FASTER.keys()
    rows = [
        convolution(kernel, size, dtype)
        for kernel, sizes in CONVOLUTIONS.items()
        for size in sizes
        for dtype in (torch.bfloat16, torch.float16)
    ]
    keep("slice_conv", rows)
    slower = [row for row in rows if row["cuda_ms"] > TOLERANCE * row["cudnn_ms"]]
    assert not slower, slower


@torch.inference_mode()
def convolution(
    kernel: tuple[int, int, int, int], size: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, Any]:
    """cuDNN's time of it, without the bias that ours adds, and ours."""
    in_dim, out_dim, kernel_t, side = kernel
    frames, height, width = size
    x = torch.randn(1, in_dim, frames + kernel_t - 1, height, width, device=DEVICE)
    weight = torch.randn(out_dim, in_dim, kernel_t, side, side, device=DEVICE) / (in_dim * 27) ** 0.5
    x, weight = (t.to(dtype, memory_format=torch.channels_last_3d) for t in (x, weight))
    slices, taps, bias = x[0].permute(1, 2, 3, 0), weight.permute(0, 2, 3, 4, 1), weight.new_zeros(out_dim)
    return {
        "channels": f"{in_dim} -> {out_dim}",
        "kernel": f"{kernel_t}x{side}x{side}",
        "pixels": f"{frames}x{height}x{width}",
        "dtype": str(dtype).removeprefix("torch."),
        "cudnn_ms": time_ms(lambda: ops.conv3d(x, weight, None, padding=(0, side // 2, side // 2))),
        "cuda_ms": time_ms(lambda: ops.slice_conv(slices, taps, bias, backend="cuda")),
    }


def audio_layer(config: DiTConfig) -> AudioCrossAttention:
    with torch.device(DEVICE):
        return AudioCrossAttention(config.dim, config.output_dim, config.num_heads).bfloat16()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_forms_of_audio_cross_attention(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer in one step, its projections and the absorbed form's matrices included."""
    config, stream = DiTConfig(), StreamConfig(height=height, width=width)
    tokens, frames = work.tokens(stream), stream.latent_frames
    layer = audio_layer(config)
    found: dict[str, float] = {}
    with torch.inference_mode():
        x = torch.randn(1, tokens, config.dim, device=DEVICE).bfloat16()
        sound = torch.randn(1, frames, config.context_tokens, config.output_dim, device=DEVICE)
        context = layer.context(sound.bfloat16())
        chosen = ops.audio_form(
            ops.AudioWork(tokens, frames, config.context_tokens, config.num_heads, config.dim)
        )
        outputs: dict[str, Tensor] = {}
        for form in ("plain", "absorbed"):
            monkeypatch.setattr(ops, "audio_form", lambda _, form=form: form)
            outputs[form] = layer(x, context).float()
            found[form] = time_ms(lambda: layer(x, context))
    assert (outputs["plain"] - outputs["absorbed"]).norm() < 0.02 * outputs["plain"].norm()
    keep(f"audio_cross_attention at {height} x {width}, ms", [{"tokens": tokens, **found}])
    assert found[chosen] <= TOLERANCE * min(found.values()), found

"""The CUDA kernel of the slice convolution, on an H100."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conv_inputs import DTYPES, KERNELS, conv_inputs, op
from csrc_build import CSRC, build, load
from random_tensors import empty_is_nan
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.config import VAEConfig
from flashtalk_rt.errors import InputError
from flashtalk_rt.modules.vae import VAE
from flashtalk_rt.ops import _dispatch


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The installed extension, or one built here if that is absent or older than the sources."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are sm_90's")
    module = op.extension()
    sources = [path.stat().st_mtime for path in CSRC.rglob("*.*")]
    old = isinstance(module, str) or Path(str(module.__file__)).stat().st_mtime < max(sources)
    if old and shutil.which("nvcc"):
        module = load(build(tmp_path_factory.mktemp("csrc")))
    if isinstance(module, str):
        pytest.skip(module)
    return module


@pytest.fixture
def extension(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The extension that the op calls; empty memory is NaN."""
    monkeypatch.setattr(op, "extension", lambda: loaded)
    _dispatch._backend_for.cache_clear()
    with empty_is_nan():
        yield loaded
    _dispatch._backend_for.cache_clear()


# Those that csrc/tests/slice_conv_model.cpp finds to run every tile, and odd ones.
SIZES = [
    ((1, 250, 250), (96, 96)),
    ((1, 125, 250), (96, 192)),
    ((1, 65, 17), (96, 96)),
    ((1, 65, 17), (96, 192)),
    ((2, 5, 9), (384, 192)),
    ((3, 33, 8), (192, 384)),
    ((1, 1, 1), (32, 288)),
    ((2, 40, 56), (192, 768)),
    ((1, 96, 56), (384, 384)),
]
with_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])


def on_gpu(
    size: tuple[int, int, int], channels: tuple[int, int], kernel: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in conv_inputs(size, channels, kernel, "cuda").items()}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@with_dtypes
@pytest.mark.parametrize("with_residual", [False, True], ids=["bias", "residual"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("size", "channels"), SIZES)
def test_the_kernel_errs_at_most_twice_as_much_as_eager(
    extension: ModuleType,
    size: tuple[int, int, int],
    channels: tuple[int, int],
    kernel: tuple[int, int],
    with_residual: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    inputs: dict[str, Any] = on_gpu(size, channels, kernel, dtype)
    if not with_residual:
        inputs["residual"] = None
    exact = op._explicit(**{k: None if v is None else v.float() for k, v in inputs.items()})
    eager = (op._through_torch(**inputs).float() - exact).abs().max().item()
    out = op.slice_conv(**inputs, backend="cuda")
    assert out.dtype == dtype and out.is_contiguous() and bool(out.isfinite().all())
    assert (out.float() - exact).abs().max().item() <= 2 * eager + 1e-5
    assert torch.equal(out, op.slice_conv(**inputs, backend="cuda")), "the same call gives the same bits"


@pytest.mark.gpu
@pytest.mark.timeout(600)
@with_dtypes
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_writes_its_output_and_nothing_else(
    extension: ModuleType, kernel: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = on_gpu((2, 37, 21), (64, 96), kernel, dtype)
    expected = op.slice_conv(**inputs, backend="cuda")
    around = torch.full((3, *expected.shape), 7.0, dtype=dtype, device="cuda")
    frames, height, width, in_channels = inputs["x"].shape
    extension.slice_conv(
        **{name: tensor.data_ptr() for name, tensor in inputs.items()}, out=around[1].data_ptr(),
        frames=frames, height=height, width=width, in_channels=in_channels, out_channels=96,
        kernel_t=kernel[0], spatial=kernel[1], dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.current_device(), stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    assert torch.equal(around[1], expected)
    assert bool((around[::2] == 7).all())


@pytest.mark.gpu
@pytest.mark.timeout(600)
@with_dtypes
def test_the_kernel_is_a_torch_op_and_replays_in_a_graph(extension: ModuleType, dtype: torch.dtype) -> None:
    inputs = on_gpu((2, 9, 10), (32, 96), (3, 3), dtype)
    torch.library.opcheck(
        op._kernel._opoverload, tuple(inputs.values()), test_utils=("test_schema", "test_faketensor")
    )
    expected = op.slice_conv(**inputs, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.slice_conv(**inputs, backend="cuda")
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
    with pytest.raises(InputError, match="has no gradient"):
        op.slice_conv(**{**inputs, "weight": inputs["weight"].requires_grad_()}, backend="cuda")


@pytest.mark.gpu
@pytest.mark.timeout(600)
@with_dtypes
@torch.no_grad()
def test_the_vae_takes_the_kernel_where_it_was_measured_faster(
    extension: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last level's convolutions listed, decoding gives the same to the dtype's rounding."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(num_res_blocks=1)).to("cuda", dtype).eval().requires_grad_(False).prepare()
    latent = torch.randn(1, 16, 2, 6, 4, device="cuda")
    calls: list[torch.Size] = []
    kernel = op._kernel

    def counted(x: Tensor, *others: Tensor | None) -> Tensor:
        calls.append(x.shape)
        out: Tensor = kernel(x, *others)
        return out

    monkeypatch.setattr(op, "_kernel", counted)
    through_cudnn = vae.decode(latent).float()
    assert calls == []
    monkeypatch.setattr(op, "MEASURED_FASTER", {(96, 96, 3, 3): (48 * 32, 4 * 48 * 32)})
    through_ours = vae.decode(latent).float()
    assert calls == [(3, 48, 32, 96)] * 4 + [(6, 48, 32, 96)] * 4  # two blocks, at one frame and at four
    assert (through_ours - through_cudnn).norm() / through_cudnn.norm() < 4 * torch.finfo(dtype).eps
    with ops.plain_backends():
        vae.decode(latent)
    assert len(calls) == 8

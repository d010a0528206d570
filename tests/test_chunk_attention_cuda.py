"""The CUDA kernel of chunk attention: its model and its machine code anywhere, itself on an H100."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from csrc_build import (
    check_attention_code,
    kernel_code,
    needs_cxx,
    needs_nvcc,
    run_model,
    skip_without_kernel,
)
from random_tensors import empty_is_nan
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError
from flashtalk_rt.ops import reference

# The package's `ops.chunk_attention` is the function.
module = sys.modules["flashtalk_rt.ops.chunk_attention"]
cuda = sys.modules["flashtalk_rt.ops.chunk_attention_cuda"]

KEYS = 192  # of the CUDA kernel's tile


# --- where it cannot run ----------------------------------------------------------------------------


@needs_cxx
def test_the_model_of_the_hardware_gives_the_plain_sum(tmp_path: Path) -> None:
    """TMA boxes with zero fill, swizzle, descriptors, fragments, the pipeline and the turns."""
    assert "of shared memory" in run_model("chunk_attention_model", tmp_path)


@pytest.mark.timeout(600)
@needs_nvcc
def test_the_softmax_falls_between_the_products(tmp_path: Path) -> None:
    """In machine code: next scores and last sums are asked for, then the exponentials, then a wait."""
    code = kernel_code("chunk_attention", tmp_path)
    check_attention_code(code, rf"HGMMA\.64x{KEYS}x16(?!.*tnspB)", r"HGMMA\.64x128x16.*tnspB", KEYS, 16)


@pytest.mark.parametrize("layout", ["a slice", "heads in front", "columns in front", "unaligned", "one head"])
def test_what_the_copy_engine_takes_is_not_copied(layout: str) -> None:
    fused = torch.zeros(2, 5, 3, 2, 128)
    x = {
        "a slice": fused[:, :, 2],
        "heads in front": torch.zeros(2, 2, 5, 128).transpose(1, 2),
        "columns in front": torch.zeros(2, 5, 128, 2).transpose(2, 3),
        "unaligned": torch.zeros(2 * 5 * 2 * 128 + 1)[1:].view(2, 5, 2, 128),
        "one head": torch.zeros(2, 5, 1, 128).as_strided((2, 5, 1, 128), (640, 128, 3, 1)),
    }[layout]
    taken = cuda.copyable(x)
    assert (taken is x) == (layout in ("a slice", "heads in front", "one head"))
    assert torch.equal(taken, x) and taken.data_ptr() % 16 == 0 and taken.stride(-1) == 1


# --- on a GPU --------------------------------------------------------------------------------------


@pytest.fixture
def kernel() -> Callable[..., Tensor]:
    """The CUDA kernel through its op.  Empty memory is NaN."""
    skip_without_kernel(cuda.extension())

    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        with empty_is_nan():
            return ops.chunk_attention(q, k, v, backend="cuda", **options)

    return run


def on_gpu(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def close(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Within twice the error of bfloat16 eager."""
    exact = reference.attend(q.float(), k.float(), v.float())
    eager = (module._eager(q, k, v).float() - exact).abs().max()
    assert bool(out.isfinite().all())
    assert (out.float() - exact).abs().max() <= 2 * eager + 1e-5


@pytest.mark.gpu
# One tile and several, whole and ragged, of queries and of keys; more tiles than a GPU has multiprocessors.
@pytest.mark.parametrize(
    ("batch", "length", "keys", "heads"),
    [
        (1, 128, 128, 1), (1, 1, 1, 1), (1, 64, 192, 1), (1, 129, 193, 2), (2, 300, 385, 3),
        (1, 257, 1000, 2), (3, 700, 191, 40), (1, 3000, 3000, 12),
    ],
)  # fmt: skip
def test_the_cuda_kernel_errs_at_most_twice_as_much_as_eager(
    kernel: Callable[..., Tensor], batch: int, length: int, keys: int, heads: int
) -> None:
    q = on_gpu(batch, length, heads, 128)
    k, v = (on_gpu(batch, keys, heads, 128, seed=i) for i in (1, 2))
    out = kernel(q, k, v)
    close(out, q, k, v)
    assert torch.equal(out, kernel(q, k, v)), "the same call gives the same bits"


@pytest.mark.gpu
def test_the_cuda_kernel_at_full_size_on_slices_of_one_projection(kernel: Callable[..., Tensor]) -> None:
    # The scores of some rows are large, so that their largest changes late.
    q, k, v = on_gpu(1, 12096, 3, 5, 128).unbind(2)
    q = q * torch.linspace(0.1, 4, 12096, device="cuda", dtype=q.dtype)[:, None, None]
    out = kernel(q, k, v)
    assert bool(out.isfinite().all())
    rows = torch.cat((torch.arange(0, 12096, 61), torch.arange(12000, 12096))).cuda()
    close(out[:, rows], q[:, rows], k, v)
    assert torch.equal(out, kernel(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [70, 300])
def test_the_cuda_kernel_sees_each_chunk_and_the_keys_up_to_its_end(
    kernel: Callable[..., Tensor], chunk: int
) -> None:
    q, k, v = (on_gpu(1, 500, 2, 128, seed=i) for i in range(3))
    k[:, chunk:], v[:, chunk:] = torch.nan, torch.nan
    out = kernel(q, k, v, chunk_tokens=chunk)
    close(out[:, :chunk], q[:, :chunk], k[:, :chunk], v[:, :chunk])
    assert out[:, chunk:].isnan().all()


@pytest.mark.gpu
def test_the_cuda_kernel_writes_its_output_and_nothing_else(kernel: Callable[..., Tensor]) -> None:
    q, k, v = (on_gpu(2, 201, 3, 128, seed=i) for i in range(3))
    expected = kernel(q, k, v)
    around = torch.full((3, *expected.shape), 7.0, dtype=torch.bfloat16, device="cuda")
    stride = dict.fromkeys(("q_strides", "k_strides", "v_strides"), q.stride()[:3])
    cuda.extension().chunk_attention(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=around[1].data_ptr(), **stride,
        batch=2, length=201, keys=201, heads=3, device=torch.cuda.current_device(),
        stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    assert torch.equal(around[1], expected)
    assert bool((around[::2] == 7).all())


@pytest.mark.gpu
def test_the_cuda_kernel_is_a_torch_op_and_replays_in_a_graph(kernel: Callable[..., Tensor]) -> None:
    q, k, v = (on_gpu(1, 150, 2, 128, seed=i) for i in range(3))
    torch.library.opcheck(
        torch.ops.flashtalk_rt.chunk_attention_cuda, (q, k, v), test_utils=("test_schema", "test_faketensor")
    )
    expected = kernel(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(q, k, v)
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
    with pytest.raises(InputError, match="has no gradient"):
        kernel(q.requires_grad_(), k, v)

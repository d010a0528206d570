"""Attention in eight bits: its rounding, its model and machine code anywhere, itself on an H100."""

from __future__ import annotations

import importlib
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
from random_tensors import empty_is_nan, normal
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError
from flashtalk_rt.ops import reference

op = importlib.import_module("flashtalk_rt.ops.quantized_attention")  # not the function
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [(1, 5, 7, 2), (2, 40, 33, 3), (1, 300, 200, 2), (1, 70, 96, 1), (1, 3, 193, 1), (1, 2, 700, 1)]


def operands(batch: int, length: int, keys: int, heads: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of unequal sizes; a query and a value of zeros, a key that outweighs its tile."""
    q, k, v = (normal(batch, n, heads, 128, seed=i) * (i + 1) for i, n in enumerate((length, keys, keys)))
    q[:, 1], v[:, -1], k[:, 2] = 0, 0, 30 * k[:, 2]
    return [x.to(device, dtype) for x in (q, k, v)]


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


# --- rounding ---------------------------------------------------------------------------------------


def test_operands_are_as_near_as_their_steps() -> None:
    q, k, v = operands(2, 40, 200, 2, "cpu", torch.float32)
    made = op.quantize_plainly(q, k, v)
    rounded = made.q.float() * made.q_scale.transpose(1, 2)[..., None]
    assert ((rounded - q).abs() <= 0.501 * made.q_scale.transpose(1, 2)[..., None]).all()
    k_scale = made.k_scale.repeat_interleave(op.TILE_KEYS, -1)[..., :200].transpose(1, 2)[..., None]
    assert ((made.k.float() * k_scale - (k - k.mean(1, keepdim=True))).abs() <= 0.501 * k_scale).all()
    assert made.k_scale.shape == (2, 2, 3)
    values = torch.empty(made.v.shape)
    values[..., op.positions(224, q.device)] = made.v.float() * made.v_scale[..., None, None]
    expected = (v - v.mean(1, keepdim=True)).permute(0, 2, 3, 1)
    torch.testing.assert_close(made.v_mean, v.mean(1))
    smallest = made.v_scale[..., None, None] * 2**-9
    assert ((values[..., :200] - expected).abs() <= expected.abs() / 16 + smallest).all()
    assert not values[..., 200:].any(), "past the end are zeros"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_round_as_the_plain_form(size: tuple[int, int, int, int], device: str) -> None:
    from flashtalk_rt.triton_kernels import quantized_attention as kernels

    q, k, v = operands(*size, device, torch.float32 if device == "cpu" else torch.bfloat16)
    with empty_is_nan():
        found = op.Operands(*kernels.quantize(q, k, v, op.TILE_KEYS))
    expected = op.quantize_plainly(q, k, v)
    for name, got, want in zip(op.Operands._fields, found, expected, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous(), name
        if name.endswith(("scale", "mean")):
            torch.testing.assert_close(got, want)
        elif name == "v":
            # The interpreter loses the carry where rounding reaches the next power of two.
            allowed = want.float().abs() * (0.51 if device == "cpu" else 0.13) + 2**-9
            assert ((got.float() - want.float()).abs() <= allowed).all()
            assert (got.float() != want.float()).float().mean() < 0.05
        else:  # a product by the reciprocal may fall on the other side of a half
            off = (got.int() - want.int()).abs()
            assert off.max() <= 1 and off.float().mean() < 1e-3, name


@INTERPRETED
def test_means_of_more_parts_than_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtalk_rt.triton_kernels import quantized_attention as kernels

    q, k, v = operands(1, 3, 500, 2, "cpu", torch.float32)  # six parts
    monkeypatch.setattr(kernels, "PARTS", 4)
    found = op.Operands(*kernels.quantize(q, k, v, op.TILE_KEYS))
    expected = op.quantize_plainly(q, k, v)
    for name in ("k_scale", "v_scale", "v_mean"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_what_is_compiled_ahead_is_what_the_op_launches() -> None:
    from flashtalk_rt.triton_kernels import quantized_attention as kernels

    constants = [dict(kernel.constants) for kernel in kernels.KERNELS]
    assert {c["TILE"] for c in constants if "TILE" in c} == {op.TILE_KEYS}


@pytest.mark.parametrize("device", DEVICES)
def test_slices_of_one_projection_are_read_as_they_lie(device: str) -> None:
    from flashtalk_rt.triton_kernels import quantized_attention as kernels

    fused = normal(2, 50, 3, 2, 128).to(device)
    found = kernels.quantize(*fused.unbind(2), op.TILE_KEYS)
    expected = kernels.quantize(*(x.contiguous() for x in fused.unbind(2)), op.TILE_KEYS)
    assert all(
        torch.equal(a.view(torch.int8), b.view(torch.int8)) for a, b in zip(found, expected, strict=True)
    )


def test_random_data_loses_a_few_percent() -> None:
    q, k, v = (normal(1, 300, 2, 64, seed=i) for i in range(3))
    assert 0.02 < relative(ops.quantized_attention(q, k, v), reference.attend(q, k, v)) < 0.05


def test_what_a_channel_of_keys_or_values_has_in_common_costs_nothing() -> None:
    q, k, v = (normal(1, 300, 2, 64, seed=i) for i in range(3))
    shifts = 10 * normal(2, 64, seed=3), 10 * normal(2, 64, seed=4)
    error = relative(ops.quantized_attention(q, k, v), reference.attend(q, k, v))
    out = ops.quantized_attention(q, k + shifts[0], v + shifts[1])
    exact = reference.attend(q, k, v)  # the shift of keys adds the same to all scores of a query
    assert relative(out - shifts[1], exact) < 1.1 * error + 1e-3


def test_a_single_key_is_its_value() -> None:
    q, k, v = normal(2, 5, 3, 16), normal(2, 1, 3, 16, seed=1), normal(2, 1, 3, 16, seed=2)
    assert relative(ops.quantized_attention(q, k, v), v.expand_as(q)) < 1e-6  # its values' mean


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.zeros(1, 4, 2, 16), torch.zeros(1, 5, 2, 16)
    for wrong in ((q, k, q), (q, k[:, :0], k[:, :0]), (q, k[..., :8], k[..., :8])):
        with pytest.raises(ValueError, match="do not fit q"):
            ops.quantized_attention(*wrong)
    with pytest.raises(ValueError, match="must be of one dtype"):
        ops.quantized_attention(q, k, k.half())
    with pytest.raises(InputError, match="has no gradient"):
        ops.quantized_attention(q.requires_grad_(), k, k)
    with torch.no_grad():
        assert ops.quantized_attention(q, k, k).shape == q.shape
        with pytest.raises(InputError, match="needs a CUDA device"):
            ops.quantized_attention(q, k, k, backend="cuda")


# --- the CUDA kernel, where it cannot run -----------------------------------------------------------


@needs_cxx
def test_the_model_of_the_hardware_gives_the_plain_sum(tmp_path: Path) -> None:
    """TMA boxes with zero fill, both swizzles, descriptors, fragments and the order of the values."""
    assert "of shared memory" in run_model("quantized_attention_model", tmp_path)


@pytest.mark.timeout(600)
@needs_nvcc
def test_the_softmax_falls_between_the_products(tmp_path: Path) -> None:
    code, keys = kernel_code("quantized_attention", tmp_path), op.TILE_KEYS
    check_attention_code(code, rf"IGMMA\.64x{keys}x32", r"QGMMA\.64x128x32", keys, 32)


# --- on a GPU ---------------------------------------------------------------------------------------


def on_gpu(*shape: int, seed: int = 0) -> Tensor:
    skip_without_kernel(op.extension())
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with empty_is_nan():
        return ops.quantized_attention(q, k, v, backend="cuda", **options)


@pytest.mark.gpu
# One tile and several, whole and ragged, of queries and of keys; more tiles than a GPU has multiprocessors.
@pytest.mark.parametrize(
    ("batch", "length", "keys", "heads"),
    [
        (1, 192, 96, 1),
        (1, 1, 1, 1),
        (1, 193, 97, 2),
        (2, 300, 385, 3),
        (3, 700, 191, 40),
        (1, 3000, 3000, 12),
    ],
)
def test_the_cuda_kernel_is_as_near_as_the_plain_form(batch: int, length: int, keys: int, heads: int) -> None:
    q = on_gpu(batch, length, heads, 128)
    k, v = (on_gpu(batch, keys, heads, 128, seed=i) for i in (1, 2))
    out = run(q, k, v)
    exact = reference.attend(q.float(), k.float(), v.float())
    assert bool(out.isfinite().all())
    assert relative(out, exact) <= 1.1 * relative(op._plain(q, k, v), exact) + 1e-3
    assert torch.equal(out, run(q, k, v)), "the same call gives the same bits"


@pytest.mark.gpu
def test_the_cuda_kernel_at_full_size_on_slices_of_one_projection() -> None:
    # The scores of some rows are large, so that their largest changes late.
    q, k, v = on_gpu(1, 12096, 3, 5, 128).unbind(2)
    q = q * torch.linspace(0.1, 4, 12096, device="cuda", dtype=q.dtype)[:, None, None]
    out = run(q, k, v)
    rows = torch.cat((torch.arange(0, 12096, 61), torch.arange(12000, 12096))).cuda()
    exact = reference.attend(q[:, rows].float(), k.float(), v.float())
    assert relative(out[:, rows], exact) <= 1.1 * relative(op._plain(q[:, rows], k, v), exact) + 1e-3


@pytest.mark.gpu
def test_sums_of_many_values_have_no_bias() -> None:
    """A float8 product's sum drops what is below some 14 bits of it: 1%, were so many values positive."""
    q, k, v = (on_gpu(1, n, 2, 128, seed=i) for i, n in enumerate((300, 12096, 12096)))
    k, v = k + 4, v + 1
    exact = reference.attend(q.float(), k.float(), v.float())
    assert abs((run(q, k, v) - exact).mean()) < 1e-3  # of 1; rounding averages out


@pytest.mark.gpu
def test_the_cuda_kernel_writes_its_output_and_nothing_else() -> None:
    q, k, v = (on_gpu(2, 201, 3, 128, seed=i) for i in range(3))
    expected = run(q, k, v)
    from flashtalk_rt.triton_kernels import quantized_attention as kernels

    made = op.Operands(*kernels.quantize(q, k, v, op.TILE_KEYS))
    around = torch.full((3, *expected.shape), 7.0, dtype=torch.bfloat16, device="cuda")
    op.extension().quantized_attention(
        **{name: x.data_ptr() for name, x in made._asdict().items()}, out=around[1].data_ptr(),
        batch=2, length=201, keys=201, heads=3, device=torch.cuda.current_device(),
        stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    assert torch.equal(around[1], expected)
    assert bool((around[::2] == 7).all())


@pytest.mark.gpu
def test_tiny_numbers_give_no_nan() -> None:
    """Where the scales' product is below what float32 holds."""
    q, k, v = (on_gpu(1, 100, 1, 128, seed=i) for i in range(3))
    assert run(q * 1e-37, k * 1e-7, v).isfinite().all()


@pytest.mark.gpu
def test_the_cuda_kernel_is_a_torch_op_and_replays_in_a_graph() -> None:
    q, k, v = (on_gpu(1, 150, 2, 128, seed=i) for i in range(3))
    torch.library.opcheck(
        torch.ops.flashtalk_rt.quantized_attention.default,
        (q, k, v),
        test_utils=("test_schema", "test_faketensor"),
    )
    expected = run(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.quantized_attention(q, k, v, backend="cuda")
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)

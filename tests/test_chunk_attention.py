"""What the registry's parity tests cannot say of Triton's chunk attention: what it never visits, tiles."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_tensors import normal, qkv
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.ops import reference

# The package's `ops.chunk_attention` is the function.
module = sys.modules["flashtalk_rt.ops.chunk_attention"]

SHARED_LIMIT_BYTES = 227 * 1024  # of an sm_90 block
# The interpreter's own: NaN arithmetic, and numpy's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
# Where Triton runs: conftest.py has its kernels interpreted only where there is no GPU.
where_triton_runs = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


def attend(q: Tensor, k: Tensor, v: Tensor, chunk: int | None = None, **options: Any) -> Tensor:
    return ops.chunk_attention(q, k, v, chunk, backend="triton", **options)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_(True) for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


# --- what is never visited -------------------------------------------------------------------------


@where_triton_runs
@pytest.mark.parametrize("chunk", [8, 40])
def test_later_chunks_do_not_reach_earlier_queries(chunk: int, device: str) -> None:
    """Not even as 0 * NaN: no tile of theirs is read."""
    q, k, v = qkv(chunk * 3 - 5, device=device)
    grad = normal(*q.shape, seed=3, device=device)
    expected, (dq, _, _) = attend(q, k, v, chunk), gradients(lambda *x: attend(*x, chunk), [q, k, v], grad)
    k[:, chunk:], v[:, chunk:] = torch.nan, torch.nan
    out = attend(q, k, v, chunk)
    assert torch.equal(out[:, :chunk], expected[:, :chunk])
    assert out[:, chunk:].isnan().all()
    found, _, _ = gradients(lambda *x: attend(*x, chunk), [q, k, v], grad)
    assert torch.equal(found[:, :chunk], dq[:, :chunk])


@where_triton_runs
@pytest.mark.parametrize("chunk", [8, 40])
def test_earlier_queries_do_not_reach_the_gradients_of_later_keys(chunk: int, device: str) -> None:
    q, k, v = qkv(chunk * 3 - 5, device=device)
    grad = normal(*q.shape, seed=3, device=device)
    _, dk, dv = gradients(lambda *x: attend(*x, chunk), [q, k, v], grad)
    q[:, :chunk], grad[:, :chunk] = torch.nan, torch.nan
    _, found_dk, found_dv = gradients(lambda *x: attend(*x, chunk), [q, k, v], grad)
    for found, expected in ((found_dk, dk), (found_dv, dv)):
        assert torch.equal(found[:, chunk:], expected[:, chunk:])
        assert found[:, :chunk].isnan().all()


@where_triton_runs
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("chunk", [None, 40])
def test_keys_past_the_length_are_not_read_and_have_no_gradient(
    chunk: int | None, as_tensor: bool, device: str
) -> None:
    length = 70
    q, k, v = qkv(100, device=device)
    bias = normal(100, seed=4, device=device)
    k[:, length:], v[:, length:], bias[length:] = torch.nan, torch.nan, torch.nan
    ends = torch.tensor([length], dtype=torch.int32, device=device) if as_tensor else length

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(q, k, v, chunk, key_length=ends, key_bias=bias)

    assert run(q, k, v, bias).isfinite().all()
    dq, dk, dv, dbias = gradients(run, [q, k, v, bias], normal(*q.shape, seed=3, device=device))
    assert dq.isfinite().all()
    for found in (dk[0], dv[0], dbias):
        assert found.isfinite().all() and not found[length:].any()


@where_triton_runs
def test_a_bias_of_minus_infinity_hides_a_key_and_a_whole_tile_of_them(device: str) -> None:
    q = normal(1, 3, 2, 16, device=device)
    k, v = (normal(1, 300, 2, 16, seed=i, device=device) for i in (1, 2))
    bias = torch.zeros(300, device=device)
    bias[:200], bias[250] = float("-inf"), float("-inf")
    seen = torch.cat((torch.arange(200, 250), torch.arange(251, 300)))
    torch.testing.assert_close(attend(q, k, v, key_bias=bias), attend(q, k[:, seen], v[:, seen]))
    grad = normal(*q.shape, seed=3, device=device)
    found = gradients(lambda *x: attend(*x, key_bias=bias), [q, k, v], grad)
    expected = gradients(lambda q, k, v: attend(q, k[:, seen], v[:, seen]), [q, k, v], grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@where_triton_runs
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(device: str) -> None:
    q, k, v = qkv(5, device=device)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    assert not attend(q, k, v, key_length=none).any()
    for found in gradients(lambda *x: attend(*x, key_length=none), [q, k, v], torch.ones_like(q)):
        assert not found.any()


@where_triton_runs
def test_a_bias_of_log_n_makes_a_key_count_n_times(device: str) -> None:
    q = normal(1, 4, 2, 16, device=device)
    k, v = (normal(1, 6, 2, 16, seed=i, device=device) for i in (1, 2))
    bias = torch.zeros(6, device=device)
    bias[5] = math.log(7)
    many = [torch.cat((x, x[:, 5:].expand(-1, 6, -1, -1)), 1) for x in (k, v)]
    for backend in ("triton", "sdpa"):
        out = ops.chunk_attention(q, k, v, key_bias=bias, backend=backend)
        torch.testing.assert_close(out, attend(q, *many))


# --- strides ---------------------------------------------------------------------------------------


@where_triton_runs
@pytest.mark.parametrize("layout", ["a slice", "channels in front"])
def test_strided_inputs_give_what_contiguous_ones_give(layout: str, device: str) -> None:
    packed = normal(2, 21, 3 * 3 * 16, device=device)
    # Its last dimension is not contiguous.
    grad = normal(2, 3, 16, 21, seed=1, device=device).permute(0, 3, 1, 2)

    def strided(packed: Tensor) -> Tensor:
        q, k, v = packed.unflatten(-1, (3, 3, 16)).unbind(2)
        if layout == "channels in front":
            q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
        assert not q.is_contiguous()
        return attend(q, k, v, 8)

    def copied(packed: Tensor) -> Tensor:
        return attend(*(x.contiguous() for x in packed.unflatten(-1, (3, 3, 16)).unbind(2)), 8)

    torch.testing.assert_close(strided(packed), copied(packed))
    torch.testing.assert_close(gradients(strided, [packed], grad), gradients(copied, [packed], grad))


@where_triton_runs
def test_the_same_inputs_give_the_same_gradients(device: str) -> None:
    inputs = [*qkv(150, heads=1, device=device), normal(150, seed=4, device=device)]
    grad = normal(1, 150, 1, 16, seed=3, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(q, k, v, 60, key_bias=bias)

    for a, b in zip(gradients(run, inputs, grad), gradients(run, inputs, grad), strict=True):
        assert torch.equal(a, b)


@where_triton_runs
@pytest.mark.parametrize("chunk", [None, 40])
def test_the_gradient_of_the_bias_is_not_that_of_a_rounded_output(chunk: int | None, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    q, k, v = (x.to(dtype) for x in qkv(70, device=device))
    bias, grad = normal(70, seed=4, device=device), normal(*q.shape, seed=3, device=device).to(dtype)
    found = gradients(lambda *x: attend(*x[:3], chunk, key_bias=x[3]), [q, k, v, bias], grad)[3]

    def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return reference.chunk_attention(q, k, v, chunk, key_bias=bias)

    expected = gradients(exact, [*(x.float() for x in (q, k, v)), bias], grad.float())[3]
    # A rounded output costs 1e-4 of float16 and 8e-4 of bfloat16.
    assert (found - expected).abs().max() < {"cpu": 3e-5, "cuda": 2e-4}[device] * expected.abs().max()


@where_triton_runs
def test_the_backward_op_keeps_torchs_rules(device: str) -> None:
    q, k, v = qkv(9, batch=2, device=device)
    bias, ends = normal(2, 9, seed=4, device=device), torch.tensor([4, 9], dtype=torch.int32, device=device)
    for extras in ((None, None), (ends, bias)):
        out, lse = torch.ops.flashtalk_rt.chunk_attention(q, k, v, *extras, 4)
        torch.library.opcheck(
            torch.ops.flashtalk_rt.chunk_attention_backward,
            (normal(*q.shape, seed=3, device=device), q, k, v, *extras, out, lse, 4, extras[1] is not None),
            test_utils=("test_schema", "test_faketensor"),
        )


@where_triton_runs
def test_the_log_sum_exp_is_natural(device: str) -> None:
    q, k, v = qkv(9, device=device)
    _, lse = torch.ops.flashtalk_rt.chunk_attention(q, k, v, None, None, None)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1))


# --- tiles -----------------------------------------------------------------------------------------

# In a process of its own: this one defined the kernels for the interpreter.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flashtalk_rt.triton_kernels import chunk_attention, chunk_attention_backward
found = []
for s in (*chunk_attention.KERNELS, *chunk_attention_backward.KERNELS):
    if s.constants["BLOCK_D"] != 128 or s.signature.get("q") != "*bf16" or not s.constants["HAS_BIAS"]:
        continue
    signature = {name: s.signature.get(name, "constexpr") for name in s.kernel.arg_names}
    # As a launch finds the model's tensors: every pointer, stride and size a multiple of 16.
    variable = [i for i, kind in enumerate(signature.values()) if kind != "constexpr"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in variable}
    source = ASTSource(s.kernel, signature=signature, constexprs=dict(s.constants), attrs=aligned)
    options = {"num_warps": s.num_warps, "num_stages": s.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    uses = ["wgmma.mma_async" in ptx, "cp.async" in ptx]
    found.append([s.kernel.fn.__name__, compiled.metadata.shared, *uses])
json.dump(found, sys.stdout)
"""


def test_the_models_tiles_run_on_tensor_cores_and_load_ahead() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert [name for name, *_ in found] == ["forward_kernel", "keys_kernel", *["queries_kernel"] * 2]
    for name, shared_bytes, tensor_cores, ahead in found:
        assert shared_bytes <= SHARED_LIMIT_BYTES, name
        assert tensor_cores and ahead, name


def test_every_tile_fits_the_shared_memory_of_sm_90() -> None:
    """What stays and the stages of what is loaded ahead; test_triton_compile.py compiles every tile."""
    from flashtalk_rt.triton_kernels import chunk_attention as forward
    from flashtalk_rt.triton_kernels import chunk_attention_backward as backward

    for table, stays, walked in (
        (forward.FORWARD, ["queries"], "keys"),
        (backward.KEYS, ["keys", "keys"], "queries"),
        (backward.QUERIES, ["queries", "queries"], "keys"),
    ):
        assert sorted(table) == sorted((dim, size) for dim in (16, 32, 64, 128) for size in (2, 4))
        for (dim, size), tile in table.items():
            rows = sum(getattr(tile, side) for side in stays) + 2 * tile.num_stages * getattr(tile, walked)
            statistics_bytes = 2 * 4 * tile.num_stages * tile.queries
            assert rows * dim * size + statistics_bytes <= SHARED_LIMIT_BYTES, (dim, size)
    compiled = [s.constants["BLOCK_D"] for s in (*forward.KERNELS, *backward.KERNELS)]
    assert set(compiled) == {16, 32, 64, 128}


# --- at full size ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1000, None), (1000, 300), (12096, None), (12096, 4032)])
def test_triton_errs_at_most_twice_as_much_as_eager_at_full_size(
    length: int, chunk: int | None, masked: bool
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    q, k, v = draw(1, length, 3, 2, 128).unbind(2)
    bias = draw(length, dtype=torch.float32) if masked else None
    ends = torch.tensor([length - 37], dtype=torch.int32, device="cuda") if masked else None
    grad = draw(1, length, 2, 128)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_(True) for x in (q, k, v)]
        inputs = leaves if bias is None else [*leaves, bias.detach().requires_grad_(True)]
        out = function(*leaves, chunk, key_length=ends, key_bias=inputs[3] if masked else None)
        return [x.float() for x in (out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype)))]

    exact = run(reference.chunk_attention, torch.float32)
    eager = run(module._eager, torch.bfloat16)
    for ours, low, right in zip(run(attend, torch.bfloat16), eager, exact, strict=True):
        assert (ours - right).abs().max() <= 2 * (low - right).abs().max() + 1e-5

"""What the registry's parity tests cannot say of chunk attention: what is never visited, and who serves."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError
from flashtalk_rt.ops import reference
from flashtalk_rt.ops._dispatch import Backend, Situation, choose
from flashtalk_rt.ops.chunk_attention import FLASH, MEASURED_TFLOPS, SPEC

# The package's `ops.chunk_attention` is the function.
module = sys.modules["flashtalk_rt.ops.chunk_attention"]
cuda = sys.modules["flashtalk_rt.ops.chunk_attention_cuda"]

H100 = Situation("cuda", torch.bfloat16, 128, capability=(9, 0), cudnn_version=91002)
CSRC = Path(__file__).parents[1] / "csrc"
TILE_KEYS = [192, 176, 128]  # of the CUDA kernel's variants
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


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def qkv(length: int, batch: int = 1, heads: int = 2, dim: int = 16, device: str = "cpu") -> list[Tensor]:
    return [normal(batch, length, heads, dim, seed=i, device=device) for i in range(3)]


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


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"key_length": 0}, "key_length is 0; there are 6 keys"),
        ({"key_length": 7}, "key_length is 7; there are 6 keys"),
        ({"key_length": torch.tensor([1, 2])}, r"key_length is torch.int64 \[2\], not int32 \[2\]"),
        ({"key_length": torch.ones(3, dtype=torch.int32)}, r"key_length is torch.int32 \[3\]"),
        ({"key_bias": torch.zeros(5)}, r"key_bias is torch.float32 \[5\], not float32 \[6\] or \[2, 6\]"),
        ({"key_bias": torch.zeros(6).half()}, "key_bias is torch.float16"),
        ({"k": torch.zeros(2, 7, 1, 16)}, r"keys \[2, 7, 1, 16\] and values \[2, 6, 1, 16\] do not fit"),
        ({"q": torch.zeros(2, 6, 3, 16)}, r"do not fit q \[2, 6, 3, 16\]"),
        ({"q": torch.zeros(2, 5, 1, 16), "chunk_tokens": 2}, "5 queries and 6 keys; with chunk_tokens"),
        ({"v": torch.zeros(2, 6, 1, 16).half()}, "torch.float32, torch.float32 and torch.float16"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    inputs = {name: torch.zeros(2, 6, 1, 16) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        ops.chunk_attention(**{**inputs, **change})


# --- who serves ------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the FlashAttention packages that Python finds; empty at first.  No extension is built."""
    names: set[str] = set()
    monkeypatch.setattr(cuda, "extension", lambda: "it is not built")
    monkeypatch.setattr(module, "importable", lambda name: name in {FLASH[n].module for n in names})
    return names


def test_the_order_is_the_measured_one() -> None:
    order = [backend.name for backend in SPEC.backends]
    assert order == ["cuda", "fa4", "cudnn", "triton", "fa2", "fa3", "sdpa"]
    for speed in MEASURED_TFLOPS.values():  # at every measured shape
        assert sorted(speed, key=lambda name: -speed[name]) == [name for name in order if name in speed]


def test_cudnn_serves_an_h100_without_flash_attention(installed: set[str]) -> None:
    choice = choose(SPEC, H100)
    assert choice.backend == "cudnn"
    assert choice.refused == {
        "cuda": "it is not built",
        "fa4": "flash-attn-4 (extra: fa4) is not installed",
    }


def test_our_kernel_serves_an_h100_where_it_is_built(
    installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed |= {"fa4"}
    monkeypatch.setattr(cuda, "extension", lambda: types.ModuleType("flashtalk_rt._C"))
    assert choose(SPEC, H100).backend == "cuda"
    assert choose(SPEC, dataclasses.replace(H100, grad=True)).backend == "fa4"


def test_flash_attention_4_serves_where_it_is_installed(installed: set[str]) -> None:
    installed |= {"fa4", "fa2"}
    assert choose(SPEC, H100).backend == "fa4"
    choice = choose(SPEC, dataclasses.replace(H100, capability=(8, 0)))
    assert choice.backend == "cudnn"
    assert choice.refused["fa4"] == "is compiled for sm_90 to sm_109, this is sm_80"


def test_what_is_installed_does_not_overtake_what_is_faster(installed: set[str]) -> None:
    installed |= {"fa2", "fa3"}
    assert choose(SPEC, H100).backend == "cudnn"
    assert choose(SPEC, dataclasses.replace(H100, cudnn_version=None)).backend == "triton"


def test_triton_serves_a_bias_or_a_length_on_the_device(installed: set[str]) -> None:
    installed |= set(FLASH)
    situation = dataclasses.replace(H100, key_mask=True)
    assert str(situation) == "cuda sm_90 bfloat16 D=128 masked keys"
    choice = choose(SPEC, situation)
    assert choice.backend == "triton"
    assert choice.refused.keys() == {"cuda", "fa4", "cudnn"}
    assert choice.refused["cudnn"].startswith("takes a bias or length of the keys only as")
    assert choice.refused["fa4"] == "takes no bias and no length of the keys"


def test_triton_serves_float32_and_sdpa_the_rest(installed: set[str]) -> None:
    installed |= set(FLASH)
    assert choose(SPEC, dataclasses.replace(H100, dtype=torch.float32)).backend == "triton"
    wide = choose(SPEC, dataclasses.replace(H100, head_dim=256))
    assert wide.backend == "sdpa"
    assert wide.refused["triton"] == "needs a head dimension of 128 or less, this is 256"
    assert choose(SPEC, Situation("cpu", torch.bfloat16, 128)).backend == "sdpa"


def test_the_cuda_kernel_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "extension", lambda: types.ModuleType("flashtalk_rt._C"))
    assert cuda.supports(H100) is None
    for change, reason in (
        ({"device_type": "cpu"}, "needs a CUDA device, this is cpu"),
        ({"capability": (10, 0)}, "needs sm_90, this is (10, 0)"),
        ({"dtype": torch.float16}, "needs bfloat16, this is torch.float16"),
        ({"head_dim": 64}, "needs a head dimension of 128, this is 64"),
        ({"key_mask": True}, "takes no bias and no length of the keys"),
        ({"grad": True}, "has no gradient"),
    ):
        assert cuda.supports(dataclasses.replace(H100, **change)) == reason
    monkeypatch.setattr(cuda, "extension", lambda: "flashtalk_rt._C is not built")
    assert cuda.supports(H100) == "flashtalk_rt._C is not built"


def test_a_result_that_must_be_differentiable_is_asked_for_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def backend_for(*arguments: Any) -> str:
        found.append(arguments[4])
        return "sdpa"

    monkeypatch.setattr(module, "backend_for", backend_for)
    inputs = qkv(4)
    ops.chunk_attention(*inputs)
    inputs[1].requires_grad_()
    ops.chunk_attention(*inputs)
    with torch.no_grad():
        ops.chunk_attention(*inputs)
    assert found == [False, True, False]


def test_a_refused_backend_says_why() -> None:
    with pytest.raises(InputError, match="backend fa4 cannot serve cpu float32 D=16: needs a CUDA device"):
        ops.chunk_attention(*qkv(4), backend="fa4")


def test_a_module_is_looked_for_without_an_error() -> None:
    assert module.importable("torch.nn")
    assert not module.importable("no_such_package.part")


def test_torch_compile_sees_through_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def supports(situation: Situation) -> str | None:
        return None if module.importable("no_such_package.part") else "is not installed"

    backends = (Backend("absent", supports), SPEC.backends[-1])
    monkeypatch.setattr(module, "SPEC", dataclasses.replace(SPEC, backends=backends))
    compiled = torch.compile(ops.chunk_attention, backend="eager", fullgraph=True)
    q, k, v = qkv(10)
    torch.testing.assert_close(compiled(q, k, v, 4), reference.chunk_attention(q, k, v, 4))


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("with_lse", [False, True])
def test_flash_attention_sees_each_chunk_and_the_keys_up_to_its_end(
    name: str, with_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
        calls.append((q.shape[1], k.shape[1]))
        out = reference.attend(q, k, v)
        return (out, None) if with_lse else out

    stub = types.ModuleType("stub")
    stub.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    for path in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, path, stub)
    monkeypatch.setattr(module, "backend_for", lambda *_, **__: name)
    q, k, v = qkv(10)
    torch.testing.assert_close(ops.chunk_attention(q, k, v, 4), reference.chunk_attention(q, k, v, 4))
    assert calls == [(4, 4), (4, 8), (2, 10)]


# --- the CUDA kernel, where it cannot run --------------------------------------------------------------


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: the model of the kernel is not run")
def test_the_model_of_the_hardware_gives_the_plain_sum(tmp_path: Path) -> None:
    """TMA boxes with zero fill, swizzle, descriptors, fragments, the pipeline and the turns."""
    source, program = CSRC / "tests" / "chunk_attention_model.cpp", tmp_path / "model"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    subprocess.run(["c++", *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("of shared memory") == len(TILE_KEYS)


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: csrc is not compiled here")
def test_the_softmax_falls_between_the_products(tmp_path: Path) -> None:
    """In machine code: next scores and last sums are asked for, then the exponentials, then a wait."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton, whose wheel holds cuobjdump, is not installed")
    kernel = tmp_path / "kernel.cubin"
    flags = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Werror=all-warnings"]
    source = CSRC / "kernels" / "chunk_attention.cu"
    subprocess.run(
        ["nvcc", *flags, "-Xptxas=-warn-spills", f"-I{CSRC}", "-cubin", "-o", kernel, source], check=True
    )
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    dump = subprocess.run([tool, "-sass", kernel], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in dump.split("Function : ")[1:]:
        keys = int(re.findall(r"TileILi(\d+)E", part)[0])
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", part, re.MULTILINE)
        found[keys] = code

        def at(pattern: str, code: list[str] = code) -> list[int]:
            return [i for i, line in enumerate(code) if re.search(pattern, line)]

        assert at(r"\b(LDL|STL)\b") == [], "local memory"
        scores, sums = at(rf"HGMMA\.64x{keys}x16(?!.*tnspB)"), at(r"HGMMA\.64x128x16.*tnspB")
        assert len(scores) == 2 * 128 // 16 and len(sums) == 2 * keys // 16, "of the first or last, of a step"
        assert len(at("HGMMA")) == len(scores) + len(sums)
        (both,) = at(r"DEPBAR\.LE gsb0, 0x1")
        end = next(i for i in at(r"DEPBAR\.LE gsb0, 0x0") if i > both)
        assert scores[-1] < sums[0] and sums[keys // 16 - 1] < both
        weights = [i for i in at(r"MUFU\.EX2") if both < i < end]
        assert len(weights) == keys // 2 + 2, "a thread's weights, and by what two rows fade"
        # What follows the release of registers belongs to the loading warp, which kept 24.
        start = at(r"USETMAXREG\.DEALLOC")[0]
        assert "0x18" in code[start]
        assert max(int(r) for line in code[start:] for r in re.findall(r"\bR(\d+)\b", line)) < 24
    assert sorted(found) == sorted(TILE_KEYS)


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


@pytest.fixture
def kernel() -> Callable[..., Tensor]:
    """The CUDA kernel with a number of keys a tile; without one, through the op.  Empty memory is NaN."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is sm_90's")
    if isinstance(found := cuda.extension(), str):
        pytest.skip(found)

    def run(q: Tensor, k: Tensor, v: Tensor, tile_keys: int | None = None, **options: Any) -> Tensor:
        if tile_keys is None:
            return ops.chunk_attention(q, k, v, backend="cuda", **options)
        torch.use_deterministic_algorithms(True, warn_only=True)
        out: Tensor = cuda.launch(q, k, v, tile_keys)
        torch.use_deterministic_algorithms(False)
        return out

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
@pytest.mark.parametrize("tile_keys", TILE_KEYS)
# One tile and several, whole and ragged, of queries and of keys; more tiles than a GPU has multiprocessors.
@pytest.mark.parametrize(
    ("batch", "length", "keys", "heads"),
    [
        (1, 128, 128, 1), (1, 1, 1, 1), (1, 64, 176, 1), (1, 129, 177, 2), (2, 300, 385, 3),
        (1, 257, 1000, 2), (3, 700, 193, 40), (1, 3000, 3000, 12),
    ],
)  # fmt: skip
def test_every_tile_of_the_cuda_kernel(
    kernel: Callable[..., Tensor], tile_keys: int, batch: int, length: int, keys: int, heads: int
) -> None:
    q = on_gpu(batch, length, heads, 128)
    k, v = (on_gpu(batch, keys, heads, 128, seed=i) for i in (1, 2))
    out = kernel(q, k, v, tile_keys)
    close(out, q, k, v)
    assert torch.equal(out, kernel(q, k, v, tile_keys)), "the same call gives the same bits"


@pytest.mark.gpu
@pytest.mark.parametrize("tile_keys", TILE_KEYS)
def test_the_cuda_kernel_at_full_size_on_slices_of_one_projection(
    kernel: Callable[..., Tensor], tile_keys: int
) -> None:
    # The scores of some rows are large, so that their largest changes late.
    q, k, v = on_gpu(1, 12096, 3, 5, 128).unbind(2)
    q = q * torch.linspace(0.1, 4, 12096, device="cuda", dtype=q.dtype)[:, None, None]
    out = kernel(q, k, v, tile_keys)
    assert bool(out.isfinite().all())
    rows = torch.cat((torch.arange(0, 12096, 61), torch.arange(12000, 12096))).cuda()
    close(out[:, rows], q[:, rows], k, v)
    assert torch.equal(out, kernel(q, k, v, tile_keys))


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
@pytest.mark.parametrize("tile_keys", TILE_KEYS)
def test_the_cuda_kernel_writes_its_output_and_nothing_else(
    kernel: Callable[..., Tensor], tile_keys: int
) -> None:
    q, k, v = (on_gpu(2, 201, 3, 128, seed=i) for i in range(3))
    expected = kernel(q, k, v, tile_keys)
    around = torch.full((3, *expected.shape), 7.0, dtype=torch.bfloat16, device="cuda")
    stride = dict.fromkeys(("q_strides", "k_strides", "v_strides"), q.stride()[:3])
    cuda.extension().chunk_attention(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=around[1].data_ptr(), **stride,
        batch=2, length=201, keys=201, heads=3, tile_keys=tile_keys, device=torch.cuda.current_device(),
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

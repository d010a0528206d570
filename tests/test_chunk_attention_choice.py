"""Which backend serves chunk attention, why another is refused, and what the public function refuses."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from random_tensors import qkv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError
from flashtalk_rt.ops import reference
from flashtalk_rt.ops._dispatch import Backend, Situation, choose
from flashtalk_rt.ops.chunk_attention import FLASH, MEASURED_TFLOPS, SPEC

# The package's `ops.chunk_attention` is the function.
module = sys.modules["flashtalk_rt.ops.chunk_attention"]
cuda = sys.modules["flashtalk_rt.ops.chunk_attention_cuda"]

H100 = Situation("cuda", torch.bfloat16, 128, capability=(9, 0), cudnn_version=91002)


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
    assert order == ["fa4", "cuda", "cudnn", "triton", "fa2", "fa3", "sdpa"]
    for speed in MEASURED_TFLOPS.values():  # at every measured shape
        assert sorted(speed, key=lambda name: -speed[name]) == [name for name in order if name in speed]


def test_cudnn_serves_an_h100_without_flash_attention(installed: set[str]) -> None:
    choice = choose(SPEC, H100)
    assert choice.backend == "cudnn"
    assert choice.refused == {
        "cuda": "it is not built",
        "fa4": "flash-attn-4 (extra: fa4) is not installed",
    }


def test_cudnn_is_called_by_name_and_leaves_other_threads_their_backends() -> None:
    """torch's switches of attention backends are the process's: while one is off, another thread fails."""
    q, k, v = (torch.empty(1, 3, 2, 8, dtype=torch.bfloat16, device="meta") for _ in range(3))
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            called.append(function.name())
            assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
            return function(*args, **(kwargs or {}))

    with Watch():
        assert module._attend(q, k, v, None, "cudnn").shape == q.shape
    assert "aten::_scaled_dot_product_cudnn_attention" in called


def test_our_kernel_serves_an_h100_where_it_is_built(
    installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "extension", lambda: types.ModuleType("flashtalk_rt._C"))
    assert choose(SPEC, H100).backend == "cuda"
    assert choose(SPEC, dataclasses.replace(H100, grad=True)).backend == "cudnn"


def test_flash_attention_4_serves_where_it_is_installed(
    installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed |= {"fa4", "fa2"}
    monkeypatch.setattr(cuda, "extension", lambda: types.ModuleType("flashtalk_rt._C"))
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

"""The first backend that can serve does; the refusals say why."""

from __future__ import annotations

import pytest
import torch

from flashtalk_rt.errors import InputError
from flashtalk_rt.ops import _dispatch
from flashtalk_rt.ops._dispatch import TRITON, Backend, OpSpec, Situation, choose

CPU = Situation("cpu", torch.float32, 128)
H100 = Situation("cuda", torch.bfloat16, 128, capability=(9, 0), cudnn_version=91002)


def fast(situation: Situation) -> str | None:
    return None if situation.capability is not None else "needs a CUDA device"


FAST = Backend("fast", fast)
PLAIN = Backend("plain", lambda situation: None)
OP = OpSpec("op", (FAST, PLAIN))


def test_the_first_that_can_serve_is_chosen() -> None:
    choice = choose(OP, H100)
    assert choice.backend == "fast"
    assert choice.refused == {}


def test_a_refused_backend_is_kept_with_its_reason() -> None:
    choice = choose(OP, CPU)
    assert choice.backend == "plain"
    assert choice.refused == {"fast": "needs a CUDA device"}


def test_none_that_can_serve_is_an_error_with_every_reason() -> None:
    with pytest.raises(
        InputError, match=r"op: no backend serves cpu float32 D=128 \(fast: needs a CUDA device\)"
    ):
        choose(OpSpec("op", (FAST,)), CPU)


@pytest.mark.parametrize("version", ["3.5.1", "2.10.0+git1"])
def test_an_older_triton_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TRITON.supports(H100) is None
    monkeypatch.setattr(_dispatch, "_triton_version", lambda: version)
    assert TRITON.supports(H100) == f"needs Triton 3.6 or newer, this is {version}"


@pytest.mark.parametrize("backends", [(), (PLAIN, PLAIN)])
def test_backends_must_be_distinct_and_present(backends: tuple[Backend, ...]) -> None:
    with pytest.raises(ValueError, match="op: backends"):
        OpSpec("op", backends)


def test_the_cpu_has_no_capability_and_no_cudnn() -> None:
    assert Situation.of(torch.device("cpu"), torch.bfloat16, 64) == Situation("cpu", torch.bfloat16, 64)


def test_a_situation_reads_as_one_phrase() -> None:
    assert str(H100) == "cuda sm_90 bfloat16 D=128"
    assert str(Situation("cpu", torch.float32)) == "cpu float32"


@pytest.mark.gpu
def test_a_cuda_device_reports_what_it_is() -> None:
    found = Situation.of(torch.device("cuda", 0), torch.bfloat16, 64)
    assert found.capability == torch.cuda.get_device_capability(0)
    assert found.cudnn_version == torch.backends.cudnn.version()

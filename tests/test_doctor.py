"""The report tells what is there, what is not, and why a backend was refused."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from flashtalk_rt import doctor
from flashtalk_rt.ops._dispatch import Backend, OpSpec

PICKY = OpSpec(
    "attention",
    (
        Backend("fast", lambda s: None if s.dtype == torch.bfloat16 else "needs bf16"),
        Backend("plain", lambda s: None),
    ),
)
HELPLESS = OpSpec("hopeless", (Backend("never", lambda s: "there is no such machine"),))


def text_of(ops: list[OpSpec]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(doctor.report(ops))
    return out.getvalue()


def test_the_report_names_the_machine_and_the_ops() -> None:
    text = text_of([PICKY])
    for word in (torch.__version__, "H.264 encoder libx264", "AAC encoder aac", "GiB", "usable of"):
        assert word in text
    for word in ("attention", "plain", "fast: needs bf16"):
        assert word in text


def test_each_dtype_has_its_row() -> None:
    rows = doctor.served_by([PICKY], [torch.device("cpu")], 128)
    assert rows == [
        ("attention", "cpu", "float32", "plain", "fast: needs bf16"),
        ("attention", "cpu", "bfloat16", "fast", "-"),
    ]


def test_an_op_that_nothing_serves_is_a_row_and_not_a_crash() -> None:
    row = doctor.served_by([HELPLESS], [torch.device("cpu")], 128)[0]
    assert row[3] == "nothing"
    assert "there is no such machine" in row[4]


def test_cpu_features_are_read_from_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 amx_bf16\n")
    rows = dict(doctor.cpu(cpuinfo))
    assert rows["CPU"] == "Some CPU"
    assert rows["CPU features"] == "avx2 yes, avx512f no, avx512_bf16 no, amx_tile no, amx_bf16 yes"
    assert "unknown" in dict(doctor.cpu(tmp_path / "absent"))["CPU features"]


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", lambda command: ["570.1, Some GPU"])
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr(doctor, "built_for", lambda: "CPU build")
    rows = dict(doctor.gpus())
    assert rows["NVIDIA driver"] == "570.1"
    assert rows["CUDA devices"] == "torch sees none; the driver has 1 that it cannot use: CPU build"


def test_a_missing_encoder_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, mode: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(doctor.av.codec, "Codec", absent)
    assert "H.264 encoder libx264 MISSING" in doctor.encoders()


def test_a_command_that_fails_gives_no_lines() -> None:
    assert doctor.run(["/nonexistent/command"]) == []
    assert doctor.run(["false"]) == []
    assert doctor.run(["echo", "one"]) == ["one"]


def test_the_cuda_extension_is_there_or_the_reason_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "extension", lambda: "flashtalk_rt._C is not built: nvcc is not on PATH")
    assert dict(doctor.software())["CUDA extension"] == "flashtalk_rt._C is not built: nvcc is not on PATH"
    module = ModuleType("flashtalk_rt._C")
    module.__file__ = "/somewhere/_C.so"
    monkeypatch.setattr(doctor, "extension", lambda: module)
    assert dict(doctor.software())["CUDA extension"] == "flashtalk_rt._C in /somewhere/_C.so"


@pytest.mark.gpu
def test_every_cuda_device_has_a_row() -> None:
    assert torch.cuda.get_device_name(0) in dict(doctor.gpus())["cuda:0"]

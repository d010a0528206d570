"""The device that is asked for: served, or named in one clear line."""

from __future__ import annotations

import pytest
import torch

import flashtalk_rt as ft


@pytest.mark.parametrize(
    "device", ["bogus", "", "cuda:", "cuda:01", "cuda:-1", "CPU", "meta", torch.device("meta"), 0]
)
def test_a_device_of_another_kind_is_refused(device: str) -> None:
    with pytest.raises(ft.InputError, match=rf"^device is '{device}'; use cpu, cuda or cuda:N$"):
        ft.load("embedded", device=device)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "cuda:0", torch.device("cuda", 1)):
        with pytest.raises(ft.InputError, match=rf"^device is {device}, but torch .* sees 0 CUDA devices"):
            ft.load("embedded", device=device)


def test_a_cpu_is_served() -> None:
    for device in ("cpu", torch.device("cpu")):
        assert ft.load("embedded", device).device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bf16"])
def test_a_dtype_that_holds_no_weights_is_refused(dtype: object) -> None:
    with pytest.raises(ft.InputError, match=r"^dtype is .*; use torch.float32, torch.bfloat16 or"):
        ft.load("embedded", "cpu", dtype)  # type: ignore[arg-type]

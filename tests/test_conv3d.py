"""Input channels padded for cuDNN's half-precision kernels; test_ops.py has the rest of `ops.conv3d`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_tensors import normal
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.ops._dispatch import Situation, choose

op = importlib.import_module("flashtalk_rt.ops.conv3d")  # not the function
NDHWC = torch.channels_last_3d
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYOUTS = [torch.contiguous_format, NDHWC]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCDHW", "NDHWC"])
@pytest.mark.parametrize(("channels", "padded"), [(2, 8), (3, 8), (8, 8), (12, 16)])
def test_padded_channels_change_no_result_and_no_layout(
    channels: int, padded: int, layout: torch.memory_format
) -> None:
    x = normal(2, channels, 5, 6, 7, dtype=torch.float64).contiguous(memory_format=layout)
    weight = normal(4, channels, 3, 3, 3, seed=1, dtype=torch.float64).contiguous(memory_format=layout)
    pair = op.padded_channels(x, weight)
    for mine, given in zip(pair, (x, weight), strict=True):
        assert mine.shape == (given.shape[0], padded, *given.shape[2:])
        assert mine.is_contiguous(memory_format=layout)
        assert torch.equal(mine[:, :channels], given) and not mine[:, channels:].any()
        assert (mine is given) == (channels == padded)
    torch.testing.assert_close(F.conv3d(*pair), F.conv3d(x, weight), rtol=1e-12, atol=1e-12)


def test_padding_passes_gradients() -> None:
    gradients = []
    for pad in (False, True):
        x, weight = (normal(2, 3, 3, 4, 5, seed=n).requires_grad_(True) for n in range(2))
        F.conv3d(*(op.padded_channels(x, weight) if pad else (x, weight))).square().sum().backward()
        gradients.append((x.grad, weight.grad))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_pads_in_half_precision_alone(dtype: torch.dtype) -> None:
    half = dtype != torch.float32
    assert choose(op.SPEC, Situation("cuda", dtype, capability=(9, 0))).backend == (
        "padded" if half else "torch"
    )
    assert choose(op.SPEC, Situation("cuda", dtype, grad=True)).backend == ("padded" if half else "torch")
    assert choose(op.SPEC, Situation("cpu", dtype)).backend == ("torch" if half else "onednn")


@pytest.mark.parametrize(("channels", "seen"), [(3, 8), (16, 16)])
def test_the_padded_backend_convolves_the_padded_pair(
    channels: int, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = normal(1, channels, 4, 6, 5), normal(7, channels, 3, 3, 3, seed=1), normal(7, seed=2)
    expected = ops.conv3d(x, weight, bias, (1, 2, 1), (0, 1, 1))
    shapes, plain = [], F.conv3d

    def convolve(x: Tensor, *others: Any) -> Tensor:
        shapes.append(x.shape[1])
        return plain(x, *others)

    monkeypatch.setattr(op, "backend_for", lambda *_, **__: "padded")
    monkeypatch.setattr(F, "conv3d", convolve)
    found = ops.conv3d(x, weight, bias, (1, 2, 1), (0, 1, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert shapes == [seen]


def results(
    convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, cotangent: Tensor
) -> list[Tensor]:
    """The convolution and its gradients in x and weight, float32."""
    x, weight = (tensor.detach().requires_grad_(True) for tensor in (x, weight))
    out = convolve(x, weight, bias, (1, 1, 1), (0, 1, 1))
    return [t.float() for t in (out, *torch.autograd.grad(out, (x, weight), cotangent.to(out.dtype)))]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCDHW", "NDHWC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 12, 16])
def test_a_convolution_on_a_gpu_fits_float32(
    channels: int, dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and gradients err at most twice as much as those of the tensors as they are."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    shapes = ((1, channels, 7, 24, 40), (96, channels, 3, 3, 3), (96,), (1, 96, 5, 24, 40))
    low = [normal(*shape, seed=n, dtype=dtype, device="cuda") for n, shape in enumerate(shapes)]
    low[:2] = [tensor.contiguous(memory_format=layout) for tensor in low[:2]]
    exact = results(F.conv3d, *(tensor.double() for tensor in low))
    eager, ours = results(F.conv3d, *low), results(ops.conv3d, *low)
    assert ops.conv3d(*low[:3], (1, 1, 1), (0, 1, 1)).dtype == dtype
    for found, plain, expected in zip(ours, eager, exact, strict=True):
        error, allowed = ((t - expected).norm() / expected.norm() for t in (found, plain))
        assert error <= 2 * allowed + 1e-5
    if layout == NDHWC:
        assert ops.conv3d(*low[:3], (1, 1, 1), (0, 1, 1)).is_contiguous(memory_format=layout)

"""The linear layer with GELU behind it: the same function wherever it runs, fused or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_tensors import normal

from flashtalk_rt import ops
from flashtalk_rt.modules.linear import Linear, linear_gelu


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 37, 64), (3, 64), (1, 1, 64), (2, 1024, 64)], ids=str)
@torch.no_grad()
def test_gelu_behind_a_product_is_its_tanh_form(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x, weight, bias = (
        scale * normal(*size, seed=i, device=device)
        for i, (scale, size) in enumerate(((2, shape), (1 / 8, (96, 64)), (1, (96,))))
    )
    x, weight, bias = (v.to(dtype) for v in (x, weight, bias))
    found = linear_gelu(x, weight, bias)
    assert found.shape == (*shape[:-1], 96) and found.dtype == dtype
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    plain = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    allowed = 1.5 * (plain.double() - exact).abs().max() + 1e-6
    # The exact GELU differs from its tanh form by 4.7e-4 at most: float16's and float32's errors are less.
    assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.gpu
def test_gelu_is_fused_only_where_nobody_wants_a_gradient() -> None:
    layer = Linear(64, 96).to("cuda", torch.bfloat16)
    x = normal(3, 64, seed=0, device="cuda").bfloat16()
    plain = F.gelu(layer(x), approximate="tanh")
    assert torch.equal(layer.gelu(x), plain) and layer.gelu(x).requires_grad
    with torch.no_grad(), ops.plain_backends():
        assert torch.equal(layer.gelu(x), plain)

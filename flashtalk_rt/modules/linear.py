"""Linear layers whose weights may be float8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import Quantized


def linear(x: Tensor | Quantized, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N] -> [..., N].

    `scale` [N, 1] belongs to a float8 weight; x then is quantised by its producer, or here.
    """
    if scale is not None:
        rows = x if isinstance(x, Quantized) else ops.quantize(x)
        return ops.linear_fp8(rows, Quantized(weight, scale), bias)
    if isinstance(x, Quantized):
        raise TypeError("a float8 input needs a float8 weight")
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The tanh form of GELU of `linear`, in one pass for half precision on a GPU without gradients.

    There torch's fused form is this one (its CPU form is the exact GELU); it rounds once, not twice.
    """
    if (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.dtype == weight.dtype == bias.dtype
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which has a decomposition of its own, in float32
        and not ops.plainly()
    ):
        rows = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
        return rows.view(*x.shape[:-1], -1)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


class Linear(nn.Linear):
    """`nn.Linear` that can hold its weight as float8 e4m3 with one scale a row, for inference."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        # In the state dict, as NAME.weight_scale, once there is one.
        self.register_parameter("weight_scale", None)
        self.weight_scale: nn.Parameter | None

    @property
    def fp8(self) -> bool:
        return self.weight_scale is not None

    def hold(self, weight: Quantized) -> None:
        """Take a float8 weight [out, in] in place of the present one; there is no way back."""
        self.weight = nn.Parameter(weight.data, requires_grad=False)
        self.weight_scale = nn.Parameter(weight.scale, requires_grad=False)

    def cast(self, dtype: torch.dtype) -> None:
        """Convert what is not float8, in place."""
        self.bias.data = self.bias.data.to(dtype)
        if not self.fp8:
            self.weight.data = self.weight.data.to(dtype)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return linear(x, self.weight, self.weight_scale, self.bias)

    def gelu(self, x: Tensor | Quantized) -> Tensor:
        """The tanh form of GELU of what `forward` returns."""
        if isinstance(x, Quantized) or self.fp8:
            return F.gelu(self(x), approximate="tanh")
        return linear_gelu(x, self.weight, self.bias)


class Fused:
    """Layers of one input as one matrix product: q, k and v of a self-attention.

    The layers' weights become rows of one matrix, so nothing is held twice; they must not be moved or
    converted afterwards.
    """

    def __init__(self, *layers: Linear) -> None:
        self._weight = _join([layer.weight for layer in layers])
        self._bias = _join([layer.bias for layer in layers])
        scales = [layer.weight_scale.data for layer in layers if layer.weight_scale is not None]
        self._scale = torch.cat(scales) if scales else None
        self._widths = [layer.out_features for layer in layers]

    def holds(self, layer: Linear) -> bool:
        """Whether `layer`, the first of its layers, still is a part of it."""
        return layer.weight.data_ptr() == self._weight.data_ptr()

    def __call__(self, x: Tensor | Quantized) -> tuple[Tensor, ...]:
        """x [..., K] -> each layer's output [..., N], slices of one tensor."""
        product = linear(x, self._weight, self._scale, self._bias)
        return torch.split(product, self._widths, dim=-1)


def _join(parameters: list[Tensor]) -> Tensor:
    """One tensor of all rows; each parameter becomes its view."""
    # Through bytes: torch concatenates no float8.
    joined = torch.cat([p.detach().view(torch.uint8) for p in parameters]).view(parameters[0].dtype)
    for parameter, rows in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = rows
    return joined

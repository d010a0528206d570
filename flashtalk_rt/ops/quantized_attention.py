"""Attention in eight bits: int8 scores, e4m3 weights and values.

After SageAttention2 (arXiv 2411.10958): the means of keys and values are taken off; queries are rounded by
row, keys by tile, values by head.  Without its two levels of sums: a tensor core keeps some 14 bits of a
float8 product's sum, and what it drops would be a bias where the values had a mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from . import _flop, reference
from . import chunk_attention_cuda as cuda
from ._dispatch import TORCH, TRITON, Backend, Case, OpSpec, Situation, backend_for
from .fp8 import FP8, FP8_MAX, scale_to
from .slice_conv import extension, loaded

INT8_MAX = 127
TILE_KEYS = 96  # keys that share a scale: the CUDA kernel's tile
WEIGHT_SCALE = 256.0  # of the weights before they are rounded: e4m3 holds 2^-9 to 448


class Operands(NamedTuple):
    """What is multiplied: each as data * scale."""

    q: Tensor  # int8 [B, L, H, D]
    q_scale: Tensor  # float32 [B, H, L]
    k: Tensor  # int8 [B, M, H, D]
    k_scale: Tensor  # float32 [B, H, M / TILE_KEYS, rounded up]
    v: Tensor  # e4m3 [B, H, D, M padded to 32], keys in the order of `positions`
    v_scale: Tensor  # float32 [B, H]
    v_mean: Tensor  # float32 [B, H, D], taken off v


def positions(count: int, device: torch.device) -> Tensor:
    """[count], a multiple of 32: the key that lies at each position of the values, as the CUDA kernel's
    products take them (position_key in csrc/include/quantized_attention.h)."""
    p = torch.arange(count, device=device)
    return p // 16 * 16 + p % 4 // 2 * 8 + p % 16 // 4 * 2 + p % 2


def quantize_plainly(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """Queries rounded by row, keys less their mean by tile, each to its largest magnitude; values less theirs
    by head, to a bound on it."""
    rows = q.float().transpose(1, 2)  # [B, H, L, D]
    q_scale = scale_to(rows.abs().amax(-1), INT8_MAX)
    keys = k.float().transpose(1, 2)
    keys = keys - keys.mean(2, keepdim=True)
    padding = -k.shape[1] % TILE_KEYS
    largest = F.pad(keys.abs().amax(-1), (0, padding)).unflatten(-1, (-1, TILE_KEYS)).amax(-1)
    k_scale = scale_to(largest, INT8_MAX)
    values = v.float().permute(0, 2, 3, 1)  # [B, H, D, M]
    v_mean = values.mean(-1)
    v_scale = scale_to(values.abs().amax((2, 3)) + v_mean.abs().amax(-1), FP8_MAX)
    padded = F.pad(values - v_mean[..., None], (0, -v.shape[1] % 32))
    ordered = padded[..., positions(padded.shape[-1], v.device)]
    return Operands(
        _to_int8(rows, q_scale).transpose(1, 2).contiguous(),
        q_scale,
        _to_int8(keys, k_scale.repeat_interleave(TILE_KEYS, -1)[..., : k.shape[1]])
        .transpose(1, 2)
        .contiguous(),
        k_scale,
        (ordered / v_scale[..., None, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8),
        v_scale,
        v_mean,
    )


def _to_int8(x: Tensor, scale: Tensor) -> Tensor:
    return ((x / scale[..., None]).clamp(-INT8_MAX, INT8_MAX) + 0.5).floor().to(torch.int8)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the kernel computes but for its sums' order and width and where weights are rounded (relative to
    the largest score so far).  One head at a time: all scores of the published size would take 23 GB."""
    operands = quantize_plainly(q, k, v)
    keys = k.shape[1]
    scale = q.shape[-1] ** -0.5
    values = torch.empty_like(operands.v, dtype=torch.float32)
    values[..., positions(values.shape[-1], v.device)] = operands.v.float()
    heads = []
    for head in range(q.shape[2]):
        k_scale = operands.k_scale[:, head].repeat_interleave(TILE_KEYS, -1)[:, None, :keys]
        exact = operands.q[:, :, head].float() @ operands.k[:, :, head].float().transpose(1, 2)
        scores = exact * (operands.q_scale[:, head, :, None] * scale) * k_scale
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        rounded = (weights * WEIGHT_SCALE).to(FP8).float() / WEIGHT_SCALE
        sums = rounded @ values[:, head, :, :keys].transpose(1, 2)
        scaled = sums * (operands.v_scale[:, head, None, None] / weights.sum(-1, keepdim=True))
        heads.append(scaled + operands.v_mean[:, head, None])
    return torch.stack(heads, dim=2).to(q.dtype)


def _cuda(situation: Situation) -> str | None:
    reason = cuda.supports(situation) or TRITON.supports(situation)
    if reason is None and getattr(extension(), "QUANTIZED_TILE_KEYS", None) != TILE_KEYS:
        return "flashtalk_rt._C is of other sources; install the package again"
    return reason


@torch.library.custom_op("flashtalk_rt::quantized_attention", mutates_args=(), device_types="cuda")
def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from ..triton_kernels import quantized_attention as kernels

    module = loaded("quantized_attention", extension())
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    batch, length, heads, _ = q.shape
    with torch.cuda.device(q.device):
        operands = Operands(*kernels.quantize(q, k, v, TILE_KEYS))
        module.quantized_attention(
            **{name: x.data_ptr() for name, x in operands._asdict().items()},
            out=out.data_ptr(),
            batch=batch,
            length=length,
            keys=k.shape[1],
            heads=heads,
            device=q.device.index,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out


@_kernel.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def quantized_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Every query over every key, in eight bits.

    q [B, L, H, D]; k, v [B, M, H, D]; one dtype; D contiguous.  q is rounded to int8 by row, k by 96 keys of
    a head, v to float8 e4m3 by head, and the softmax's weights to e4m3: 4% of the result's size on standard
    normal inputs, where bfloat16 loses 0.2%.  Plain torch, which serves where the kernel cannot (it is
    sm_90's, for heads of 128), goes head by head in float32.  A NaN in q or k alone does not show.
    Returns [B, L, H, D] in q's dtype.  ValueError where the shapes do not belong together; InputError where a
    gradient would be needed, and why `backend` cannot serve.
    """
    reference.check_operands(q, k, v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise InputError(
            "quantized_attention has no gradient: call it under torch.no_grad(), or train in bfloat16"
        )
    if backend_for(SPEC, q.device, q.dtype, q.shape[-1], wanted=backend) == "cuda":
        out: Tensor = _kernel(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)))
        return out
    return _plain(q, k, v)


def _case(batch: int, length: int, heads: int, dim: int, keys: int | None = None) -> Case:
    """Without keys, as many as queries, and all three slices of one tensor."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        if keys is None:
            return dict(zip("qkv", normal(batch, length, 3, heads, dim).unbind(2), strict=True))
        return {
            "q": normal(batch, length, heads, dim),
            "k": normal(batch, keys, heads, dim),
            "v": normal(batch, keys, heads, dim),
        }

    return Case(f"{batch}x{length}x{heads}x{dim}" + ("" if keys is None else f" keys={keys}"), make)


SPEC = OpSpec(
    "quantized_attention",
    (Backend("cuda", _cuda), TORCH),
    function=quantized_attention,
    reference=reference.attend,
    eager=_plain,
    cases=(
        _case(1, 300, 1, 128),  # more tiles than one, and ragged ones
        _case(2, 129, 3, 128, keys=200),
        _case(1, 5, 2, 128, keys=7),
        _case(1, 70, 1, 128, keys=96),
        _case(1, 1, 1, 16, keys=3),  # plain torch's alone
    ),
    workload=_case(1, 12096, 40, 128),
    flop=_flop.chunk_attention,
    eight_bit=True,
)

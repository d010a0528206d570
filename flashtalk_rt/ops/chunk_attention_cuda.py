"""Attention by the CUDA kernel of `csrc`: every query over every key, forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import Situation
from .slice_conv import extension, loaded

HEAD_DIM = 128  # the one that the kernel is written for


def supports(situation: Situation) -> str | None:
    """None if the kernel can serve; else one line that says why not."""
    if situation.device_type != "cuda":
        return f"needs a CUDA device, this is {situation.device_type}"
    if situation.capability != (9, 0):
        return f"needs sm_90, this is {situation.capability}"
    if situation.dtype != torch.bfloat16:
        return f"needs bfloat16, this is {situation.dtype}"
    if situation.head_dim != HEAD_DIM:
        return f"needs a head dimension of {HEAD_DIM}, this is {situation.head_dim}"
    if situation.key_mask:
        return "takes no bias and no length of the keys"
    if situation.grad:
        return "has no gradient"
    found = extension()
    return found if isinstance(found, str) else None


@torch.library.custom_op("flashtalk_rt::chunk_attention_cuda", mutates_args=(), device_types="cuda")
def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """csrc/api/chunk_attention.h"""
    module = loaded("chunk_attention", extension())
    batch, length, heads, _ = q.shape
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    tensors = {"q": copyable(q), "k": copyable(k), "v": copyable(v)}
    with torch.cuda.device(q.device):
        module.chunk_attention(
            **{name: x.data_ptr() for name, x in tensors.items()},
            **{f"{name}_strides": x.stride()[:3] for name, x in tensors.items()},
            out=out.data_ptr(),
            batch=batch,
            length=length,
            keys=k.shape[1],
            heads=heads,
            device=q.device.index,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out


@kernel.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def copyable(x: Tensor) -> Tensor:
    """x as the copy engine takes it, else a copy: contiguous columns, all else at multiples of 16 bytes."""
    strides = zip(x.shape[:3], x.stride()[:3], strict=True)
    aligned = all(size == 1 or (step > 0 and step % 8 == 0) for size, step in strides)
    if aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)

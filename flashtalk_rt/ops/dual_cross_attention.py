"""Cross-attention to text and image in one pass over the queries, and the text's collapsed padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError
from . import _flop, reference
from . import chunk_attention_cuda as attention_cuda
from . import dual_cross_attention_cuda as cuda
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Backend, Case, OpSpec, Situation, backend_for


def _triton(situation: Situation) -> str | None:
    reason = TRITON.supports(situation)
    if reason is None and situation.head_dim not in (16, 32, 64, 128):
        return f"needs a head dimension of 16, 32, 64 or 128, this is {situation.head_dim}"
    return reason


TRITON_HEADS = Backend("triton", _triton)
"""Kernels of `triton_kernels` that attend."""

CUDA = Backend("cuda", attention_cuda.supports, cuda.misfit)


@torch.library.custom_op("flashtalk_rt::dual_cross_attention", mutates_args=())
def _kernel(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, text_bias: Tensor | None
) -> Tensor:
    from ..triton_kernels import cross_attention

    return cross_attention.dual_cross_attention(q, text_k, text_v, image_k, image_v, text_bias)


@_kernel.register_fake
def _(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, text_bias: Tensor | None
) -> Tensor:
    return torch.empty_like(q)


def _plain(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, text_bias: Tensor | None
) -> tuple[Tensor]:
    return (reference.dual_cross_attention(q, text_k, text_v, image_k, image_v, text_bias),)


differentiate_through(_kernel, _plain)


def dual_cross_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    *,
    text_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One query against two separate softmaxes, text's and image's, summed (WAN2.1 image-to-video).

    q [B, L, H, D]; text_k, text_v [B, T, H, D]; image_k, image_v [B, I, H, D]; one dtype.
    text_bias [T] or [B, T] float32 is added to the scaled text scores q . k * D^-0.5: log(m) makes a key
    count m times (`padding_bias`); -inf hides a key, and the kernel reads nothing behind the last
    visible one, so the text may lie in a buffer of fixed length.  At least one text key must be left.
    Returns [B, L, H, D] in q's dtype.  ValueError where shapes, dtypes or devices do not belong together.
    """
    batch, dim = q.shape[0], q.shape[-1]
    reference.check_operands(q, text_k, text_v, "text ")
    reference.check_operands(q, image_k, image_v, "image ")
    text = text_k.shape[1]
    if text_bias is not None and text_bias.shape not in ((text,), (batch, text)):
        raise ValueError(f"text_bias {[*text_bias.shape]} is neither [{text}] nor [{batch}, {text}]")
    if text_bias is not None and text_bias.device != q.device:
        raise ValueError(
            f"text_bias is on {text_bias.device} and q on {q.device}; they must be on one device"
        )
    tensors = q, text_k, text_v, image_k, image_v
    given = tensors if text_bias is None else (*tensors, text_bias)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    chosen = backend_for(SPEC, q.device, q.dtype, dim, grad, wanted=backend)
    if chosen == "cuda" and (reason := CUDA.misfit(*tensors, text_bias)):
        if backend == "cuda":
            raise InputError(f"dual_cross_attention: backend cuda {reason}")
        chosen = "triton"
    if chosen in ("cuda", "triton"):
        kernel = cuda.kernel if chosen == "cuda" else _kernel
        bias = None if text_bias is None else text_bias.float().contiguous()
        out: Tensor = kernel(*(x.contiguous() for x in tensors), bias)
        return out
    return reference.dual_cross_attention(q, text_k, text_v, image_k, image_v, text_bias)


def padding_bias(real: int, length: int, device: torch.device) -> Tensor:
    """The `text_bias` [length] float32 of a prompt of `real` tokens, padded to `length` without a mask.

    The padded tokens all have the same key and value, so the first of them counts for all, by
    log(length - real), and the others are hidden; the real tokens keep 0.  Exact: m equal keys add
    m e^s = e^(s + log m) to a softmax.  ValueError unless 0 <= real <= length.
    """
    if not 0 <= real <= length:
        raise ValueError(f"{real} real tokens of {length}")
    bias = torch.zeros(length, device=device)
    if real < length:
        bias[real:] = float("-inf")
        bias[real : real + 1].fill_(math.log(length - real))  # no copy from the host, so it can be captured
    return bias


def _case(
    batch: int,
    length: int,
    heads: int,
    dim: int,
    text: int,
    image: int,
    bias: tuple[int, ...] | None,
    visible: int = 512,
) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(tokens: int) -> Tensor:
            return torch.randn((batch, tokens, heads, dim), generator=generator, device=device).to(dtype)

        tensors = {
            "q": normal(length),
            "text_k": normal(text),
            "text_v": normal(text),
            "image_k": normal(image),
            "image_v": normal(image),
        }
        if bias is None:
            return {**tensors, "text_bias": None}
        added = torch.randn(bias, generator=generator, device=device)
        added[..., visible:] = float("-inf")
        return {**tensors, "text_bias": added}

    return Case(f"{batch}x{length}x{heads}x{dim} text {min(text, visible)} image {image} bias {bias}", make)


SPEC = OpSpec(
    "dual_cross_attention",
    (CUDA, TRITON_HEADS, TORCH),
    function=dual_cross_attention,
    reference=reference.dual_cross_attention,
    cases=(
        _case(2, 5, 3, 16, 1, 1, bias=None),
        _case(2, 133, 1, 16, 33, 65, bias=(2, 33)),
        _case(1, 7, 2, 64, 7, 5, bias=(7,)),
        _case(1, 3, 1, 128, 7, 67, bias=(7,)),
        # Image keys that are held in shared memory, several heads a program; text beyond what is held.
        _case(2, 133, 2, 128, 33, 257, bias=(2, 33)),
        _case(1, 128, 1, 128, 120, 256, bias=None),
        _case(1, 200, 3, 128, 64, 272, bias=(64,), visible=7),
        _case(1, 200, 3, 128, 64, 260, bias=(1, 64), visible=60),
    ),
    workload=_case(1, 12096, 40, 128, 512, 257, bias=(512,), visible=33),
    flop=_flop.dual_cross_attention,
    gradients=("q", "text_k", "text_v", "image_k", "image_v", "text_bias"),
)

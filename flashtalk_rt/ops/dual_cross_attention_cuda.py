"""Cross-attention to text and image by the CUDA kernel of `csrc`, and by Triton's where the text is long."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .slice_conv import extension, loaded


class Limits(NamedTuple):
    """What the kernel takes."""

    fewest_image: int  # keys
    most_image: int
    text: int  # keys, visible ones where there is a bias
    fewest_queries: int  # Triton's, which is launched behind it


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def limits() -> tuple[int, ...] | str:
    """`Limits` as torch.compile takes a constant; a string says why there is no kernel."""
    from ..triton_kernels.resident_attention import RESIDENT

    module = extension()
    if isinstance(module, str):
        return module
    return (*module.CROSS_IMAGE_KEYS, module.CROSS_TEXT_KEYS, RESIDENT.queries)


def misfit(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    text_bias: Tensor | None = None,
) -> str | None:
    """None if the kernel takes tensors of these sizes; else one line that says why not."""
    found = limits()
    if isinstance(found, str):
        return found
    takes = Limits(*found)
    if not takes.fewest_image <= image_k.shape[1] <= takes.most_image:
        return f"takes {takes.fewest_image} to {takes.most_image} image keys, not {image_k.shape[1]}"
    if text_bias is None and text_k.shape[1] > takes.text:
        return f"takes {takes.text} text keys without a bias, not {text_k.shape[1]}"
    if q.shape[1] < takes.fewest_queries:
        return f"takes {takes.fewest_queries} queries or more, not {q.shape[1]}"
    return None


@torch.library.custom_op("flashtalk_rt::dual_cross_attention_cuda", mutates_args=(), device_types="cuda")
def kernel(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, text_bias: Tensor | None
) -> Tensor:
    """csrc/api/cross_attention.h, on contiguous tensors.

    How much of the text is visible, only the device knows.  So Triton's kernel is launched behind it for the
    batches that it leaves alone; where there are none, that one returns at once.
    """
    from ..triton_kernels import resident_attention as triton

    module = loaded("dual_cross_attention", extension())
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    batch, length, heads, _ = q.shape
    tensors = q, text_k, text_v, image_k, image_v
    with torch.cuda.device(q.device):
        module.cross_attention(
            **{
                name: x.data_ptr()
                for name, x in zip(("q", "text_k", "text_v", "image_k", "image_v"), tensors, strict=True)
            },
            text_bias=0 if text_bias is None else text_bias.data_ptr(),
            out=out.data_ptr(),
            batch=batch,
            length=length,
            text=text_k.shape[1],
            image=image_k.shape[1],
            heads=heads,
            shared_bias=text_bias is not None and text_bias.ndim == 1,
            device=q.device.index,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    if text_bias is not None and text_k.shape[1] > module.CROSS_TEXT_KEYS:
        triton.launch_resident((*tensors, text_bias, out), triton.RESIDENT, but_text=module.CROSS_TEXT_KEYS)
    return out


@kernel.register_fake
def _(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, text_bias: Tensor | None
) -> Tensor:
    return torch.empty_like(q)

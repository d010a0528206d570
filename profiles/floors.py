"""Floors, measured: the products, attentions and convolutions of `work` alone, each by the fastest there is
(the vendor's libraries, and kernels that the caller adds), and the rate of a plain copy.  No runtime of ours
can be much faster than their sum.

Data is random (zeros draw less power and run faster) and larger than the L2 cache in turn, and the clocks are
those that the GPU holds under the load (`timing.measure`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import FlashTalkError
from .timing import measure, rotation
from .work import Attention, Convolution, Gemm, Work

FP8 = torch.float8_e4m3fn
COPY_BYTES = 1 << 30
PRODUCT_SIZE = 8192  # a side of the square matrices whose product's rate is taken
SETTLE_MS = 200.0  # as in a stream, where a chunk follows a chunk
_FUSED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Convolve = Callable[[Tensor, Tensor], Tensor]


def floor_ms(
    work: Iterable[Work],
    device: torch.device,
    dtype: torch.dtype,
    gemm_dtype: torch.dtype,
    repeats: int,
    attends: Sequence[Attend] = (),
    convolves: Sequence[Convolve] = (),
) -> float:
    """The sum of the medians of all items, equal ones timed once.

    dtype: of attentions and convolutions; gemm_dtype: of products, float8_e4m3fn for rowwise scaled ones;
    attends, convolves: functions that compete with the libraries' (`attention_ms`, `convolution_ms`).
    """
    total_ms = 0.0
    for item, count in Counter(work).items():
        match item:
            case Gemm():
                one_ms = gemm_ms(item, device, gemm_dtype, repeats)
            case Attention():
                one_ms = attention_ms(item, device, dtype, repeats, attends)
            case Convolution():
                one_ms = convolution_ms(item, device, dtype, repeats, convolves)
        total_ms += count * one_ms
    return total_ms


def gemm_ms(gemm: Gemm, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """One product of activations [m, k] and a weight [n, k], as a linear layer without bias; a batched one
    of [batch, m, k] and [batch, n, k], not in float8."""
    batch = [gemm.batch] if gemm.batch > 1 else []

    def make() -> tuple[Tensor, Tensor]:
        return (
            torch.randn(*batch, gemm.m, gemm.k, device=device).to(dtype),
            torch.randn(*batch, gemm.n, gemm.k, device=device).to(dtype),
        )

    def batched(x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(x, weight.mT)

    size_bytes = gemm.batch * (gemm.m + gemm.n) * gemm.k * dtype.itemsize
    if batch:
        return measure(
            batched, device, rotation(make, size_bytes, device), repeats, settle_ms=SETTLE_MS
        ).median_ms
    if dtype != FP8:
        return measure(
            F.linear, device, rotation(make, size_bytes, device), repeats, settle_ms=SETTLE_MS
        ).median_ms
    rows = torch.rand(gemm.m, 1, device=device) + 0.5
    columns = torch.rand(1, gemm.n, device=device) + 0.5

    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch._scaled_mm(
            x, weight.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return out

    return measure(scaled, device, rotation(make, size_bytes, device), repeats, settle_ms=SETTLE_MS).median_ms


def attention_ms(
    attention: Attention,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    others: Sequence[Attend],
) -> float:
    """One attention by the fastest of torch's backends that takes it, and of `others`, functions of q, k and
    v [batch, tokens, heads, head_dim]."""
    a = attention

    def make() -> tuple[Tensor, Tensor, Tensor]:
        sizes = (a.queries, a.keys, a.keys)
        q, k, v = (torch.randn(a.batch, n, a.heads, a.head_dim, device=device, dtype=dtype) for n in sizes)
        return q, k, v

    size_bytes = a.batch * (a.queries + 2 * a.keys) * a.heads * a.head_dim * dtype.itemsize
    inputs = rotation(make, size_bytes, device)
    attends = [*others, *(_sdpa(backend) for backend in (*_FUSED, SDPBackend.MATH))]
    times_ms: list[float] = []
    for attend in attends:
        if attend is attends[-1] and times_ms:
            break  # it would hold every score, and is not needed
        try:
            attend(*inputs[0])
        except torch.OutOfMemoryError:
            raise  # it may be the fastest
        except (RuntimeError, FlashTalkError):
            continue  # it does not take the shape, the dtype or the device
        times_ms.append(measure(attend, device, inputs, repeats, settle_ms=SETTLE_MS).median_ms)
    return min(times_ms)


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    return attend


def convolution_ms(
    convolution: Convolution,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    others: Sequence[Convolve] = (),
) -> float:
    """One convolution without bias, channels-last, its temporal context already in the input: by torch, or by
    the fastest of `others` that take it.

    Those are functions of x [1, C, T, H, W] and weight [O, C, kt, k, k] which keep the picture's size.
    """
    c = convolution
    frames = (c.frames - 1) * c.stride[0] + c.kernel[0]
    # A kernel of 2 has one pixel of padding in all, on whichever side.
    height, width = (
        side * stride + (kernel % 2 == 0)
        for side, stride, kernel in zip((c.height, c.width), c.stride[1:], c.kernel[1:], strict=True)
    )
    layout = torch.channels_last_3d
    weight = torch.randn(c.out_dim, c.in_dim, *c.kernel, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=layout)
    padding = (0, (c.kernel[1] - 1) // 2, (c.kernel[2] - 1) // 2)

    def make() -> tuple[Tensor]:
        x = torch.randn(1, c.in_dim, frames, height, width, device=device, dtype=dtype)
        return (x.contiguous(memory_format=layout),)

    def convolve(x: Tensor) -> Tensor:
        return F.conv3d(x, weight, None, c.stride, padding)

    size_bytes = c.in_dim * frames * height * width * dtype.itemsize
    inputs = rotation(make, size_bytes, device)
    times_ms = [measure(convolve, device, inputs, repeats, settle_ms=SETTLE_MS).median_ms]
    keeps_size = set(c.stride) == {1} and c.kernel[1] % 2 == 1
    for other in others if keeps_size else ():

        def compete(x: Tensor, other: Convolve = other) -> Tensor:
            return other(x, weight)

        try:
            compete(*inputs[0])
        except FlashTalkError:
            continue  # it does not take the shape, the dtype or the device
        times_ms.append(measure(compete, device, inputs, repeats, settle_ms=SETTLE_MS).median_ms)
    return min(times_ms)


def copy_bytes_per_s(device: torch.device, repeats: int, size_bytes: int = COPY_BYTES) -> float:
    """Bytes read and written a second by a large copy on the device."""
    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (
        2
        * size_bytes
        / (measure(target.copy_, device, [(source,)], repeats, settle_ms=SETTLE_MS).median_ms / 1e3)
    )


def product_flop_per_s(
    device: torch.device, dtype: torch.dtype, repeats: int, size: int = PRODUCT_SIZE
) -> float:
    """Operations a second of the product of two large square matrices; dtype as in `gemm_ms`."""
    gemm = Gemm(size, size, size)
    return gemm.flop / (gemm_ms(gemm, device, dtype, repeats) / 1e3)

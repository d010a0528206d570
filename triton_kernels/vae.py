"""The VAE between its convolutions: sums, norms, caches, the end of upsampling and the last layer.

Activations are NDHWC (channels_last_3d), so a pixel's channels are one contiguous row, a program handles
BLOCK_P rows, and every access is coalesced.  Statistics are float32.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import silu
from .launching import launch
from .specialization import Specialization

NDHWC = torch.channels_last_3d
# Of a program of `head_taps_kernel`: with two stages, two programs share a multiprocessor without spilling.
HEAD_PIXELS = 64


@triton.jit
def load_sum(
    x, bias, shortcut, offsets, columns, mask,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHORTCUT: tl.constexpr,
):  # fmt: skip
    """x + bias + shortcut for rows of C channels, rounded once, as a stored sum would be."""
    row = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        row += tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    if HAS_SHORTCUT:
        row += tl.load(shortcut + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, row, 0.0).to(x.dtype.element_ty)


@triton.jit
def rms_silu(row, gamma, columns, eps, C: tl.constexpr, FAST: tl.constexpr):
    """silu(row / rms(row) * gamma) of rows [P, BLOCK_C] whose channels past C are zero; float32."""
    row = row.to(tl.float32)
    weight = tl.load(gamma + columns, mask=columns < C, other=0.0).to(tl.float32)
    return silu(row * tl.rsqrt(tl.sum(row * row, 1) / C + eps)[:, None] * weight[None, :], FAST)


@triton.jit
def add_residual_kernel(
    x, bias, shortcut, out, rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out = x + bias + shortcut."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_C)
    mask = (at < rows)[:, None] & (columns < C)[None, :]
    offsets = at[:, None] * C + columns[None, :]
    row = load_sum(x, bias, shortcut, offsets, columns, mask, C, HAS_BIAS, True)
    tl.store(out + offsets, row, mask=mask)


@triton.jit
def norm_silu_kernel(
    x, bias, shortcut, gamma, past, total, out,
    pixels, frames, past_batch_stride, out_batch_stride, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SHORTCUT: tl.constexpr, HAS_PAST: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels through all frames of `out`, whose first two are the past.

    The past may be what lies in the last two until then: no other program touches these pixels.
    """
    at = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    mask = (at < pixels)[:, None] & (columns < C)[None, :]
    offsets = at[:, None] * C + columns[None, :]
    plane = tl.cast(pixels, tl.int64) * C
    target = out + batch * out_batch_stride + offsets
    older = tl.zeros((BLOCK_P, BLOCK_C), out.dtype.element_ty)
    newer = older
    if HAS_PAST:
        kept = past + batch * past_batch_stride + offsets
        older = tl.load(kept, mask=mask, other=0.0)
        newer = tl.load(kept + plane, mask=mask, other=0.0)
        tl.debug_barrier()  # every thread has read before one writes
    tl.store(target, older, mask=mask)
    tl.store(target + plane, newer, mask=mask)
    for t in range(frames):
        source = (batch * frames + t) * plane + offsets
        row = load_sum(x, bias, shortcut, source, columns, mask, C, HAS_BIAS, HAS_SHORTCUT)
        if HAS_SHORTCUT:
            tl.store(total + source, row, mask=mask)
        row = rms_silu(row, gamma, columns, eps, C, FAST).to(out.dtype.element_ty)
        tl.store(target + (t + 2) * plane, row, mask=mask)


@triton.jit
def double_frames_kernel(
    x, bias, out, pixels, frames,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels of one frame of `out` [B, 2 frames, pixels, C] from x [B, frames, pixels, 2, C]."""
    at = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    mask = (at < pixels)[:, None] & (columns < C)[None, :]
    half = frame % 2
    source = ((batch * frames + frame // 2) * pixels + at) * 2 + half
    row = tl.load(x + source[:, None] * C + columns[None, :], mask=mask, other=0.0)
    if HAS_BIAS:
        added = tl.load(bias + half * C + columns, mask=columns < C, other=0.0).to(tl.float32)
        row = (row.to(tl.float32) + added[None, :]).to(out.dtype.element_ty)
    target = (batch * 2 * frames + frame) * pixels + at
    tl.store(out + target[:, None] * C + columns[None, :], row, mask=mask)


@triton.jit
def interleave_kernel(
    phases, bias, out, height, width,
    OUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels of one picture out [2 height, 2 width, OUT] from phases
    [height + 1, width + 1, 4 OUT].

    Pixel (2 i + a, 2 j + b) is phase 2 a + b at (i + a, j + b).
    """
    at = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    image = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    pixels = 4 * height * width
    mask = (at < pixels)[:, None] & (columns < OUT)[None, :]
    y, x = at // (2 * width), at % (2 * width)
    a, b = y % 2, x % 2
    source = (image * (height + 1) + y // 2 + a) * (width + 1) + x // 2 + b
    offsets = (source * 4 + 2 * a + b)[:, None] * OUT + columns[None, :]
    row = tl.load(phases + offsets, mask=mask, other=0.0).to(tl.float32)
    row += tl.load(bias + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    target = (image * pixels + at)[:, None] * OUT + columns[None, :]
    tl.store(out + target, row.to(out.dtype.element_ty), mask=mask)


@triton.jit
def head_taps_kernel(
    x, bias, shortcut, gamma, past, weight, taps, future,
    pixels, frames, past_batch_stride, future_batch_stride, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SHORTCUT: tl.constexpr, HAS_PAST: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels through all frames: what each contributes to its neighbours, summed over time.

    weight [3, C, N] by temporal tap; taps [B, T, N, pixels] float32, N a neighbour's place and an output
    channel; future [B, 2, pixels, C], the last two normalised frames, maybe where the past lies until then.
    """
    at = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    batch = tl.program_id(1).to(tl.int64)
    columns, outputs = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    mask = (at < pixels)[:, None] & (columns < C)[None, :]
    offsets = at[:, None] * C + columns[None, :]
    places = columns[:, None] * N + outputs[None, :]
    known = (columns < C)[:, None] & (outputs < N)[None, :]
    first = tl.load(weight + places, mask=known, other=0.0)
    second = tl.load(weight + C * N + places, mask=known, other=0.0)
    third = tl.load(weight + 2 * C * N + places, mask=known, other=0.0)
    # A frame is the third tap of its own output, the second of the next and the first of the one after.
    # `older` and `newer` are those two outputs so far; before the start the frames are zero.
    older = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    newer = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    kept = future + batch * future_batch_stride + offsets
    if HAS_PAST:
        source = past + batch * past_batch_stride + offsets
        row = tl.load(source, mask=mask, other=0.0)
        newer = tl.dot(row, first, newer, input_precision="ieee")
        row = tl.load(source + pixels * C, mask=mask, other=0.0)
        tl.debug_barrier()  # every thread has read before one writes
        older = tl.dot(row, second, newer, input_precision="ieee")
        newer = tl.dot(row, first, input_precision="ieee")
        if frames == 1:
            tl.store(kept, row, mask=mask)
    elif frames == 1:
        tl.store(kept, tl.zeros((BLOCK_P, BLOCK_C), future.dtype.element_ty), mask=mask)
    for t in range(frames):
        frame = batch * frames + t
        place = frame * pixels * C + offsets
        row = load_sum(x, bias, shortcut, place, columns, mask, C, HAS_BIAS, HAS_SHORTCUT)
        row = rms_silu(row, gamma, columns, eps, C, FAST).to(x.dtype.element_ty)
        done = tl.dot(row, third, older, input_precision="ieee")
        older = tl.dot(row, second, newer, input_precision="ieee")
        newer = tl.dot(row, first, input_precision="ieee")
        target = taps + (frame * N + outputs)[None, :] * pixels + at[:, None]
        tl.store(target, done, mask=(at < pixels)[:, None] & (outputs < N)[None, :])
        if t >= frames - 2:
            tl.store(kept + (t - frames + 2) * pixels * C, row, mask=mask)


@triton.jit
def head_sum_kernel(
    taps, bias, out, frames, height, width,
    OUT: tl.constexpr, BLOCK: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of one frame: the nine neighbours' contributions, zero beyond the edges."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    pixels = height * width
    y, x = at // width, at % width
    for o in tl.static_range(OUT):
        total = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + o).to(tl.float32)
        for tap in tl.static_range(9):
            dy, dx = tap // 3 - 1, tap % 3 - 1
            inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            plane = taps + (((batch * frames + frame) * 9 + tap) * OUT + o) * pixels
            total += tl.load(plane + at + dy * width + dx, mask=inside & (at < pixels), other=0.0)
        if CLAMP:
            total = tl.clamp(total, -1.0, 1.0)
        target = out + ((batch * OUT + o) * frames + frame) * pixels + at
        tl.store(target, total.to(out.dtype.element_ty), mask=at < pixels)


def add_residual(x: Tensor, bias: Tensor | None, shortcut: Tensor) -> Tensor:
    """Launch `add_residual_kernel`; arguments as `ops.add_residual`."""
    x, shortcut = (v.contiguous(memory_format=NDHWC) for v in (x, shortcut))
    out = torch.empty_like(x, memory_format=NDHWC)
    channels = x.shape[1]
    rows = x.numel() // channels
    block_c, block_p = _blocks(channels)
    launch(
        add_residual_kernel, (triton.cdiv(rows, block_p),),
        x, x if bias is None else bias, shortcut, out, rows,
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p, HAS_BIAS=bias is not None,
    )  # fmt: skip
    return out


def norm_silu(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, past: Tensor | None, out: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """Launch `norm_silu_kernel`; arguments as `ops.add_norm_silu`, `out` with NDHWC frames.  Returns the
    total, empty without a shortcut."""
    batch, channels, frames, height, width = x.shape
    x = x.contiguous(memory_format=NDHWC)
    shortcut = shortcut if shortcut is None else shortcut.contiguous(memory_format=NDHWC)
    past = _past(past)
    total = x.new_empty(0) if shortcut is None else torch.empty_like(x, memory_format=NDHWC)
    block_c, block_p = _blocks(channels)
    launch(
        norm_silu_kernel, (triton.cdiv(height * width, block_p), batch),
        x, x if bias is None else bias, x if shortcut is None else shortcut, gamma,
        x if past is None else past, total, out,
        height * width, frames, 0 if past is None else past.stride(0), out.stride(0), eps,
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p,
        HAS_BIAS=bias is not None, HAS_SHORTCUT=shortcut is not None, HAS_PAST=past is not None,
        FAST=x.is_cuda,
    )  # fmt: skip
    return total


def double_frames(x: Tensor, bias: Tensor | None) -> Tensor:
    """Launch `double_frames_kernel`; arguments as `ops.double_frames`."""
    x = x.contiguous(memory_format=NDHWC)
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels // 2, 2 * frames, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=NDHWC)
    block_c, block_p = _blocks(channels // 2)
    launch(
        double_frames_kernel, (triton.cdiv(height * width, block_p), 2 * frames, batch),
        x, x if bias is None else bias, out, height * width, frames,
        C=channels // 2, BLOCK_C=block_c, BLOCK_P=block_p, HAS_BIAS=bias is not None,
    )  # fmt: skip
    return out


def interleave(phases: Tensor, bias: Tensor) -> Tensor:
    """Launch `interleave_kernel`: phases [N, 4 O, H + 1, W + 1], bias [O] -> [N, O, 2 H, 2 W], NHWC."""
    images, channels, height, width = phases.shape
    channels, height, width = channels // 4, height - 1, width - 1
    phases = phases.contiguous(memory_format=torch.channels_last)
    shape = (images, channels, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last)
    block_c, block_p = _blocks(channels)
    launch(
        interleave_kernel, (triton.cdiv(4 * height * width, block_p), images),
        phases, bias, out, height, width, OUT=channels, BLOCK_C=block_c, BLOCK_P=block_p,
    )  # fmt: skip
    return out


def head(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, past: Tensor | None,
    weight: Tensor, out_bias: Tensor, clamp: bool, future: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Launch `head_taps_kernel` and `head_sum_kernel`; arguments as `ops.vae_head`, `future` with NDHWC
    frames.  Returns the frames."""
    batch, channels, frames, height, width = x.shape
    outputs, pixels = weight.shape[0], height * width
    x = x.contiguous(memory_format=NDHWC)
    shortcut = shortcut if shortcut is None else shortcut.contiguous(memory_format=NDHWC)
    past = _past(past)
    columns = 9 * outputs
    packed = weight.permute(2, 1, 3, 4, 0).reshape(3, channels, columns).contiguous()
    taps = x.new_empty((batch, frames, columns, pixels), dtype=torch.float32)
    launch(
        head_taps_kernel, (triton.cdiv(pixels, HEAD_PIXELS), batch),
        x, x if bias is None else bias, x if shortcut is None else shortcut, gamma,
        x if past is None else past, packed, taps, future,
        pixels, frames, 0 if past is None else past.stride(0), future.stride(0), eps,
        C=channels, BLOCK_C=max(16, triton.next_power_of_2(channels)),
        N=columns, BLOCK_N=max(16, triton.next_power_of_2(columns)), BLOCK_P=HEAD_PIXELS,
        HAS_BIAS=bias is not None, HAS_SHORTCUT=shortcut is not None, HAS_PAST=past is not None,
        FAST=x.is_cuda, num_stages=2,
    )  # fmt: skip
    out = x.new_empty((batch, outputs, frames, height, width))
    block = 512
    launch(
        head_sum_kernel, (triton.cdiv(pixels, block), frames, batch),
        taps, out_bias, out, frames, height, width, OUT=outputs, BLOCK=block, CLAMP=clamp,
    )  # fmt: skip
    return out


def _blocks(channels: int) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P): 4,096 elements a program, 32 a thread of four warps."""
    block = triton.next_power_of_2(channels)
    return block, max(1, 4096 // block)


def _past(past: Tensor | None) -> Tensor | None:
    """`past` with NDHWC frames; a slice of a longer tensor, whose videos lie apart, stays where it is."""
    if past is None or past[:1].is_contiguous(memory_format=NDHWC):
        return past
    return past.contiguous(memory_format=NDHWC)


HELPERS = ("load_sum", "rms_silu")
_ACTIVATIONS = ("x", "bias", "shortcut", "gamma", "past", "total", "out", "phases", "weight", "future")
_NUMBERS = (
    "pixels", "frames", "past_batch_stride", "out_batch_stride", "future_batch_stride", "rows", "height",
    "width",
)  # fmt: skip


def _specialized(kernel: triton.JITFunction, num_stages: int = 3, **constants: int | bool) -> Specialization:
    """`kernel` for fp16 activations, the product's on a GPU, and the given constexpr parameters."""
    types = {
        **dict.fromkeys(_ACTIVATIONS, "*fp16"),
        **dict.fromkeys(_NUMBERS, "i32"),
        "taps": "*fp32",
        "eps": "fp32",
    }
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    return Specialization(kernel, signature, constants, num_stages=num_stages)


def _in_bf16(form: Specialization) -> Specialization:
    signature = {name: kind.replace("*fp16", "*bf16") for name, kind in form.signature.items()}
    return dataclasses.replace(form, signature=signature)


_WIDE = {"C": 96, "BLOCK_C": 128, "BLOCK_P": 32}
_FORMS = (
    *(_specialized(add_residual_kernel, **_WIDE, HAS_BIAS=has) for has in (False, True)),
    *(
        _specialized(
            norm_silu_kernel, **_WIDE,
            HAS_BIAS=has_bias, HAS_SHORTCUT=has_shortcut, HAS_PAST=has_past, FAST=True,
        )
        for has_bias, has_shortcut in ((False, False), (True, False), (True, True))
        for has_past in (False, True)
    ),
    *(
        _specialized(double_frames_kernel, C=384, BLOCK_C=512, BLOCK_P=8, HAS_BIAS=has)
        for has in (False, True)
    ),
    _specialized(interleave_kernel, OUT=96, BLOCK_C=128, BLOCK_P=32),
    *(
        _specialized(
            head_taps_kernel, num_stages=2, C=96, BLOCK_C=128, N=27, BLOCK_N=32, BLOCK_P=HEAD_PIXELS,
            HAS_BIAS=has_sum, HAS_SHORTCUT=has_sum, HAS_PAST=has_past, FAST=True,
        )
        for has_sum in (False, True)
        for has_past in (False, True)
    ),
    *(_specialized(head_sum_kernel, OUT=3, BLOCK=512, CLAMP=clamp) for clamp in (False, True)),
)  # fmt: skip
# In bf16 each kernel's last form alone, which does most: to compile takes time.
KERNELS = (*_FORMS, *map(_in_bf16, {form.kernel: form for form in _FORMS}.values()))

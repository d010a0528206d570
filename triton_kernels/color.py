"""Colour matching in CIE Lab: one pass over the frames measures them, another moves them.

Frames are planes of pixels; a program handles BLOCK pixels of one frame.  The formulas and constants are
those of `ops/reference.py`; powers go through log2 and exp2, which are good to a few units in 2^-22.  What
bounds both passes is arithmetic, 6 to 9 powers a pixel, hence FAST and no division by a constant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .specialization import Specialization

BLOCK = 1024


@triton.jit
def power(x, exponent: tl.constexpr, FAST: tl.constexpr):
    """x ** exponent, x positive; smaller than 1e-12 counts as that.

    FAST, on a GPU: the logarithm is one instruction, off by 2^-22 at most, where the exact one takes twelve.
    Triton's interpreter has no inline assembly.
    """
    x = tl.maximum(x, 1e-12)
    if FAST:
        logarithm = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        logarithm = tl.log2(x)
    return tl.exp2(exponent * logarithm)


@triton.jit
def to_linear(c, FAST: tl.constexpr):
    """sRGB's curve to linear light."""
    return tl.where(c > 0.04045, power(c * (1 / 1.055) + 0.055 / 1.055, 2.4, FAST), c * (1 / 12.92))


@triton.jit
def to_lab_curve(t, FAST: tl.constexpr):
    """Lab's f."""
    return tl.where(t > 0.008856, power(t, 1 / 3, FAST), t * (903.3 / 116) + 16 / 116)


@triton.jit
def from_lab_curve(f):
    """The inverse of Lab's f."""
    cube = f * f * f
    return tl.where(cube > 0.008856, cube, f * (116 / 903.3) - 16 / 903.3)


@triton.jit
def to_gamma(c, FAST: tl.constexpr):
    """Linear light to sRGB's curve, clipped to [0, 1]."""
    curved = 1.055 * power(c, 1 / 2.4, FAST) - 0.055
    return tl.clamp(tl.where(c > 0.0031308, curved, 12.92 * c), 0.0, 1.0)


@triton.jit
def to_lab(red, green, blue, FAST: tl.constexpr):
    """sRGB in [0, 1] -> L, a, b."""
    red, green, blue = to_linear(red, FAST), to_linear(green, FAST), to_linear(blue, FAST)
    x = to_lab_curve((0.4124564 * red + 0.3575761 * green + 0.1804375 * blue) * (1 / 0.95047), FAST)
    y = to_lab_curve(0.2126729 * red + 0.7151522 * green + 0.0721750 * blue, FAST)
    z = to_lab_curve((0.0193339 * red + 0.1191920 * green + 0.9503041 * blue) * (1 / 1.08883), FAST)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@triton.jit
def to_rgb(lightness, a, b, FAST: tl.constexpr):
    """L, a, b -> sRGB clipped to [0, 1]; the matrix has the white point in it."""
    y = (lightness + 16) * (1 / 116)
    x = from_lab_curve(y + a * (1 / 500))
    z = from_lab_curve(y - b * (1 / 200))
    y = from_lab_curve(y)
    red = 3.07995450 * x - 1.53713850 * y - 0.54281594 * z
    green = -0.92125826 * x + 1.87601080 * y + 0.04524742 * z
    blue = 0.05288738 * x - 0.20402590 * y + 1.15113851 * z
    return to_gamma(red, FAST), to_gamma(green, FAST), to_gamma(blue, FAST)


@triton.jit
def load_rgb(frames, at, mask, plane_stride, pixel_stride):
    """One frame's pixels from [-1, 1] to [0, 1], float32."""
    pointers = frames + at.to(tl.int64) * pixel_stride
    red = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    green = tl.load(pointers + plane_stride, mask=mask, other=0.0).to(tl.float32)
    blue = tl.load(pointers + 2 * plane_stride, mask=mask, other=0.0).to(tl.float32)
    return (red + 1) * 0.5, (green + 1) * 0.5, (blue + 1) * 0.5


@triton.jit
def store_moments(values, weights, squares, mask, count, out, channel: tl.constexpr):
    """The weighted mean of `values`, and the sum of `squares` and of weighted squared distances from it.

    Relative to the largest value, so that equal values give exactly themselves and zero.
    """
    largest = tl.max(tl.where(mask, values, float("-inf")), 0)
    centred = tl.where(mask, values - largest, 0.0)
    mean = tl.sum(centred * weights, 0) / count
    centred = tl.where(mask, centred - mean, 0.0)
    tl.store(out + channel, largest + mean)
    tl.store(out + 3 + channel, tl.sum(squares + centred * centred * weights, 0))


@triton.jit
def lab_moments_kernel(
    frames, moments,
    pixels, blocks, frames_a_video, batch_stride, plane_stride, frame_stride, pixel_stride,
    BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """moments [frames, blocks, 6]: means of L, a and b over one block, and sums of squared distances."""
    block, frame = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < pixels
    frames += (frame // frames_a_video) * batch_stride + (frame % frames_a_video) * frame_stride
    red, green, blue = load_rgb(frames, at, mask, plane_stride, pixel_stride)
    lightness, a, b = to_lab(red, green, blue, FAST)
    count = tl.minimum(pixels - block * BLOCK, BLOCK).to(tl.float32)
    ones, zeros = tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32)
    out = moments + (frame * blocks + block) * 6
    store_moments(lightness, ones, zeros, mask, count, out, 0)
    store_moments(a, ones, zeros, mask, count, out, 1)
    store_moments(b, ones, zeros, mask, count, out, 2)


@triton.jit
def combine_moments_kernel(
    moments, combined, pixels, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """One frame's blocks to combined [frames, 6]: means, and sums of squared distances (Chan et al. 1979)."""
    frame = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    mask = block < blocks
    counts = tl.where(mask, tl.minimum(pixels - block * BLOCK, BLOCK), 0).to(tl.float32)
    source = moments + (frame * blocks + block) * 6
    for channel in tl.static_range(3):
        means = tl.load(source + channel, mask=mask, other=0.0)
        squares = tl.load(source + 3 + channel, mask=mask, other=0.0)
        store_moments(means, counts, squares, mask, pixels, combined + frame * 6, channel)


@triton.jit
def match_channel(value, own, mean, std, pixels, channel: tl.constexpr):
    """Shift and scale one Lab channel; a flat one has nothing to scale and only moves."""
    deviation = tl.sqrt(tl.load(own + 3 + channel) / pixels)
    gain = tl.where(deviation > 1e-8, tl.load(std + channel) / tl.maximum(deviation, 1e-8), 1.0)
    return (value - tl.load(own + channel)) * gain + tl.load(mean + channel)


@triton.jit
def store_color(out, rgb, at, mask, own, matched, strength, plane: tl.constexpr, HAS_RGB: tl.constexpr):
    """Blend one colour of one frame, from [0, 1] to [-1, 1] into `out` and to 0..255 into `rgb`."""
    value = ((own + strength * (matched - own)) * 2 - 1).to(out.dtype.element_ty)
    tl.store(out + at, value, mask=mask)
    if HAS_RGB:
        scaled = tl.clamp((value.to(tl.float32) + 1) * 127.5, 0.0, 255.0)
        # Of a sum past 2^23 no fraction is left: it was rounded, half to even.
        whole = (scaled + 8388608.0) - 8388608.0
        tl.store(rgb + at * 3 + plane, whole.to(tl.uint8), mask=mask)


@triton.jit
def color_match_kernel(
    frames, combined, mean, std, out, rgb, strength,
    pixels, frames_a_video, batch_stride, plane_stride, frame_stride, pixel_stride,
    mean_batch_stride, mean_frame_stride, out_batch_stride, out_plane_stride, out_frame_stride,
    rgb_batch_stride, rgb_frame_stride,
    BLOCK: tl.constexpr, HAS_RGB: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Move one frame to the wanted statistics and blend, into planes of `out` and the triples of `rgb`."""
    frame = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < pixels
    video, index = frame // frames_a_video, frame % frames_a_video
    source = frames + video * batch_stride + index * frame_stride
    red, green, blue = load_rgb(source, at, mask, plane_stride, pixel_stride)
    lightness, a, b = to_lab(red, green, blue, FAST)
    own = combined + frame * 6
    wanted = video * mean_batch_stride + index * mean_frame_stride
    lightness = match_channel(lightness, own, mean + wanted, std + wanted, pixels, 0)
    a = match_channel(a, own, mean + wanted, std + wanted, pixels, 1)
    b = match_channel(b, own, mean + wanted, std + wanted, pixels, 2)
    new_red, new_green, new_blue = to_rgb(lightness, a, b, FAST)
    out += video * out_batch_stride + index * out_frame_stride
    rgb += video * rgb_batch_stride + index * rgb_frame_stride
    store_color(out, rgb, at, mask, red, new_red, strength, 0, HAS_RGB)
    store_color(out + out_plane_stride, rgb, at, mask, green, new_green, strength, 1, HAS_RGB)
    store_color(out + 2 * out_plane_stride, rgb, at, mask, blue, new_blue, strength, 2, HAS_RGB)


def lab_moments(frames: Tensor) -> Tensor:
    """[B * T, 2, 3] float32: every frame's means of L, a and b, and sums of squared distances from them.

    frames [B, 3, T, H, W] in [-1, 1].
    """
    frames = _planes(frames)
    batch, _, length, height, width = frames.shape
    pixels, count = height * width, batch * length
    blocks = triton.cdiv(pixels, BLOCK)
    moments = frames.new_empty((count, blocks, 6), dtype=torch.float32)
    combined = frames.new_empty((count, 2, 3), dtype=torch.float32)
    launch(
        lab_moments_kernel, (blocks, count),
        frames, moments, pixels, blocks, length, *_strides(frames), BLOCK=BLOCK, FAST=frames.is_cuda
    )  # fmt: skip
    launch(
        combine_moments_kernel, (count,),
        moments, combined, pixels, blocks, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks)
    )  # fmt: skip
    return combined


def color_match(
    frames: Tensor, mean: Tensor, std: Tensor, strength: float, out: Tensor, rgb: Tensor | None
) -> None:
    """Launch both passes; arguments as `ops.color_match`.

    out [B, 3, T, H, W], each plane contiguous, of any floating dtype; rgb uint8 [B, T, H, W, 3], each picture
    contiguous, or None.
    """
    frames = _planes(frames)
    batch, _, length, height, width = frames.shape
    combined = lab_moments(frames)
    mean, std = (v.float().contiguous().expand(batch, length, 3, 1, 1) for v in (mean, std))
    launch(
        color_match_kernel, (triton.cdiv(height * width, BLOCK), batch * length),
        frames, combined, mean, std, out, out if rgb is None else rgb, strength,
        height * width, length, *_strides(frames),
        mean.stride(0), mean.stride(1), *out.stride()[:3], *((0, 0) if rgb is None else rgb.stride()[:2]),
        BLOCK=BLOCK, HAS_RGB=rgb is not None, FAST=frames.is_cuda,
    )  # fmt: skip


def _planes(frames: Tensor) -> Tensor:
    """`frames`, copied if one stride does not lead from every pixel to the next."""
    return frames if frames.stride(3) == frames.shape[4] * frames.stride(4) else frames.contiguous()


def _strides(frames: Tensor) -> tuple[int, int, int, int]:
    """Of the batch, a plane, a frame and a pixel."""
    batch, plane, frame, _, pixel = frames.stride()
    return batch, plane, frame, pixel


HELPERS = (
    "from_lab_curve", "load_rgb", "match_channel", "power", "store_color", "store_moments", "to_gamma",
    "to_lab", "to_lab_curve", "to_linear", "to_rgb",
)  # fmt: skip


def _specialized(
    kernel: triton.JITFunction, frames: str, out: str = "*fp32", **constants: int | bool
) -> Specialization:
    """`kernel` for frames and results of the given Triton types, and the given constexpr parameters."""
    kinds = {
        "frames": frames,
        "out": out,
        "rgb": "*u8",
        "strength": "fp32",
        **dict.fromkeys(("moments", "combined", "mean", "std"), "*fp32"),
    }
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return Specialization(kernel, signature, constants)


_KINDS = ("*fp32", "*bf16", "*fp16")
KERNELS = (
    *(_specialized(lab_moments_kernel, kind, BLOCK=BLOCK, FAST=True) for kind in _KINDS),
    *(
        _specialized(color_match_kernel, kind, kind, BLOCK=BLOCK, HAS_RGB=False, FAST=True)
        for kind in _KINDS[:2]
    ),
    *(_specialized(color_match_kernel, kind, BLOCK=BLOCK, HAS_RGB=True, FAST=True) for kind in _KINDS),
    _specialized(combine_moments_kernel, "*fp32", BLOCK=BLOCK, BLOCKS=512),
)

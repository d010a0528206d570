"""Colour matching in CIE Lab: one pass over the frames measures them, another moves them.

Frames are planes of pixels; a program handles BLOCK pixels of one frame.  The formulas and constants are
those of `ops/reference.py`; powers go through log2 and exp2, which are good to a few units in 2^-22.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialization import Specialization

BLOCK = 1024


@triton.jit
def power(x, exponent: tl.constexpr):
    """x ** exponent, x positive; smaller than 1e-12 counts as that."""
    return tl.exp2(exponent * tl.log2(tl.maximum(x, 1e-12)))


@triton.jit
def to_linear(c):
    """sRGB's curve to linear light."""
    return tl.where(c > 0.04045, power((c + 0.055) / 1.055, 2.4), c / 12.92)


@triton.jit
def to_lab_curve(t):
    """Lab's f."""
    return tl.where(t > 0.008856, power(t, 1 / 3), 7.787 * t + 16 / 116)


@triton.jit
def from_lab_curve(f):
    """The inverse of Lab's f."""
    return tl.where(f > 0.2068966, f * f * f, (f - 16 / 116) / 7.787)


@triton.jit
def to_gamma(c):
    """Linear light to sRGB's curve, clipped to [0, 1]."""
    return tl.clamp(tl.where(c > 0.0031308, 1.055 * power(c, 1 / 2.4) - 0.055, 12.92 * c), 0.0, 1.0)


@triton.jit
def to_lab(red, green, blue):
    """sRGB in [0, 1] -> L, a, b."""
    red, green, blue = to_linear(red), to_linear(green), to_linear(blue)
    x = to_lab_curve((0.412453 * red + 0.357580 * green + 0.180423 * blue) / 0.95047)
    y = to_lab_curve(0.212671 * red + 0.715160 * green + 0.072169 * blue)
    z = to_lab_curve((0.019334 * red + 0.119193 * green + 0.950227 * blue) / 1.08883)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@triton.jit
def to_rgb(lightness, a, b):
    """L, a, b -> sRGB clipped to [0, 1]; the matrix is the inverse of `to_lab`'s, white points included."""
    y = (lightness + 16) / 116
    x = from_lab_curve(y + a / 500)
    z = from_lab_curve(tl.maximum(y - b / 200, 0.0))
    y = from_lab_curve(y)
    red = 3.0799803 * x - 1.53715152 * y - 0.54282131 * z
    green = -0.92124775 * x + 1.87599 * y + 0.04524734 * z
    blue = 0.05289046 * x - 0.20404134 * y + 1.15123201 * z
    return to_gamma(red), to_gamma(green), to_gamma(blue)


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
    BLOCK: tl.constexpr,
):  # fmt: skip
    """moments [frames, blocks, 6]: means of L, a and b over one block, and sums of squared distances."""
    block, frame = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < pixels
    frames += (frame // frames_a_video) * batch_stride + (frame % frames_a_video) * frame_stride
    red, green, blue = load_rgb(frames, at, mask, plane_stride, pixel_stride)
    lightness, a, b = to_lab(red, green, blue)
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
def store_plane(out, plane, frame, frames_a_video, pixels, at, mask, own, matched, strength):
    """Blend one colour of one frame, and from [0, 1] to [-1, 1]."""
    value = (own + strength * (matched - own)) * 2 - 1
    tl.store(out + (plane * frames_a_video + frame) * pixels + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def color_match_kernel(
    frames, combined, mean, std, out, strength,
    pixels, frames_a_video, batch_stride, plane_stride, frame_stride, pixel_stride,
    mean_batch_stride, mean_frame_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move one frame to the wanted statistics and blend; `out` is contiguous [B, 3, T, pixels]."""
    frame = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < pixels
    video, index = frame // frames_a_video, frame % frames_a_video
    source = frames + video * batch_stride + index * frame_stride
    red, green, blue = load_rgb(source, at, mask, plane_stride, pixel_stride)
    lightness, a, b = to_lab(red, green, blue)
    own = combined + frame * 6
    wanted = video * mean_batch_stride + index * mean_frame_stride
    lightness = match_channel(lightness, own, mean + wanted, std + wanted, pixels, 0)
    a = match_channel(a, own, mean + wanted, std + wanted, pixels, 1)
    b = match_channel(b, own, mean + wanted, std + wanted, pixels, 2)
    new_red, new_green, new_blue = to_rgb(lightness, a, b)
    store_plane(out, video * 3, index, frames_a_video, pixels, at, mask, red, new_red, strength)
    store_plane(out, video * 3 + 1, index, frames_a_video, pixels, at, mask, green, new_green, strength)
    store_plane(out, video * 3 + 2, index, frames_a_video, pixels, at, mask, blue, new_blue, strength)


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
    lab_moments_kernel[(blocks, count)](
        frames, moments, pixels, blocks, length, *_strides(frames), BLOCK=BLOCK
    )
    combine_moments_kernel[(count,)](
        moments, combined, pixels, blocks, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks)
    )
    return combined


def color_match(frames: Tensor, mean: Tensor, std: Tensor, strength: float) -> Tensor:
    """Launch both passes; arguments as `ops.color_match`.  The result is contiguous."""
    frames = _planes(frames)
    batch, _, length, height, width = frames.shape
    combined = lab_moments(frames)
    mean, std = (v.float().contiguous().expand(batch, length, 3, 1, 1) for v in (mean, std))
    out = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device)
    color_match_kernel[(triton.cdiv(height * width, BLOCK), batch * length)](
        frames, combined, mean, std, out, strength, height * width, length, *_strides(frames),
        mean.stride(0), mean.stride(1), BLOCK=BLOCK,
    )  # fmt: skip
    return out


def _planes(frames: Tensor) -> Tensor:
    """`frames`, copied if one stride does not lead from every pixel to the next."""
    return frames if frames.stride(3) == frames.shape[4] * frames.stride(4) else frames.contiguous()


def _strides(frames: Tensor) -> tuple[int, int, int, int]:
    """Of the batch, a plane, a frame and a pixel."""
    batch, plane, frame, _, pixel = frames.stride()
    return batch, plane, frame, pixel


HELPERS = (
    "from_lab_curve", "load_rgb", "match_channel", "power", "store_moments", "store_plane", "to_gamma",
    "to_lab", "to_lab_curve", "to_linear", "to_rgb",
)  # fmt: skip


def _specialized(kernel: triton.JITFunction, kind: str, **constants: int) -> Specialization:
    """`kernel` for frames of one Triton type and the given constexpr parameters."""
    pointers = {"frames": kind, "out": kind, **dict.fromkeys(("moments", "combined", "mean", "std"), "*fp32")}
    signature = {
        name: pointers.get(name, "fp32" if name == "strength" else "i32")
        for name in kernel.arg_names
        if name not in constants
    }
    return Specialization(kernel, signature, constants)


KERNELS = (
    *(
        _specialized(kernel, kind, BLOCK=BLOCK)
        for kernel in (lab_moments_kernel, color_match_kernel)
        for kind in ("*fp32", "*bf16")
    ),
    _specialized(combine_moments_kernel, "*fp32", BLOCK=BLOCK, BLOCKS=512),
)

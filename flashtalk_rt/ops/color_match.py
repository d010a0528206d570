"""Colour matching in CIE Lab: the frames are read once to be measured, once to be moved."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from . import reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for
from ._shapes import check_video


@torch.library.custom_op("flashtalk_rt::lab_statistics", mutates_args=())
def _statistics_kernel(frames: Tensor) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import color

    moments = color.lab_moments(frames).view(frames.shape[0], frames.shape[2], 2, 3, 1, 1)
    # A copy each, since the results of an op may not share their memory.
    return moments[:, :, 0].clone(), (moments[:, :, 1] / (frames.shape[3] * frames.shape[4])).sqrt()


@_statistics_kernel.register_fake
def _(frames: Tensor) -> tuple[Tensor, Tensor]:
    shape = (frames.shape[0], frames.shape[2], 3, 1, 1)
    return frames.new_empty(shape, dtype=torch.float32), frames.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("flashtalk_rt::color_match", mutates_args=())
def _match_kernel(frames: Tensor, mean: Tensor, std: Tensor, strength: float) -> Tensor:
    from ..triton_kernels import color

    out = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device)
    color.color_match(frames, mean, std, strength, out, None)
    return out


@_match_kernel.register_fake
def _(frames: Tensor, mean: Tensor, std: Tensor, strength: float) -> Tensor:
    return frames.new_empty(frames.shape)


def _plain_match(frames: Tensor, mean: Tensor, std: Tensor, strength: float) -> tuple[Tensor]:
    return (reference.color_match(frames, mean, std, strength),)


@torch.library.custom_op("flashtalk_rt::color_match_pixels", mutates_args=("matched", "pixels"))
def _pixels_kernel(
    frames: Tensor, mean: Tensor, std: Tensor, strength: float, matched: Tensor, pixels: Tensor
) -> None:
    from ..triton_kernels import color

    color.color_match(frames, mean, std, strength, matched, pixels)


@_pixels_kernel.register_fake
def _(frames: Tensor, mean: Tensor, std: Tensor, strength: float, matched: Tensor, pixels: Tensor) -> None:
    pass


differentiate_through(_statistics_kernel, reference.lab_statistics)
differentiate_through(_match_kernel, _plain_match)


def lab_statistics(frames: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Per-frame mean and population deviation of L, a and b: frames [B, 3, T, H, W] in [-1, 1] ->
    two [B, T, 3, 1, 1] float32."""
    _check("lab_statistics", frames)
    if backend_for(LAB_STATISTICS, frames.device, frames.dtype, wanted=backend) == "triton":
        return _statistics_kernel(frames)  # type: ignore[no-any-return]
    return reference.lab_statistics(frames)


def color_match(
    frames: Tensor, mean: Tensor, std: Tensor, strength: float, *, backend: str | None = None
) -> Tensor:
    """Shift and scale each frame's Lab channels to a reference's `lab_statistics`.

    frames [B, 3, T, H, W] in [-1, 1]; mean and std [B or 1, T or 1, 3, 1, 1] float32; `strength` in [0, 1]
    blends between the frames (0: they are returned as they are) and the matched ones (1).  Returns frames'
    dtype.
    """
    _check("color_match", frames, mean, std)
    if strength == 0:
        return frames
    if backend_for(COLOR_MATCH, frames.device, frames.dtype, wanted=backend) == "triton":
        return _match_kernel(frames, mean, std, strength)  # type: ignore[no-any-return]
    return reference.color_match(frames, mean, std, strength)


def color_match_pixels(
    frames: Tensor,
    mean: Tensor,
    std: Tensor,
    strength: float,
    *,
    into: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`color_match` as float32 [B, 3, T, H, W], whatever the frames' dtype, and its pixels
    uint8 [B, T, H, W, 3]: (x + 1) * 127.5, half to even, within 0..255.  Without a gradient.

    into: where both go and what is returned, say slices along time of longer buffers; each of its planes
    [H, W] and each of its pictures [H, W, 3] must be contiguous.
    """
    _check("color_match_pixels", frames, mean, std)
    if into is not None:
        _check_into(frames, *into)
    serving = backend_for(COLOR_MATCH_PIXELS, frames.device, frames.dtype, wanted=backend)
    if strength == 0 or serving != "triton":
        found = reference.color_match_pixels(frames, mean, std, strength)
        if into is None:
            return found
        for target, source in zip(into, found, strict=True):
            target.copy_(source)
        return into
    if into is None:
        batch, _, length, height, width = frames.shape
        into = (
            frames.new_empty(frames.shape, dtype=torch.float32),
            frames.new_empty((batch, length, height, width, 3), dtype=torch.uint8),
        )
    _pixels_kernel(frames, mean, std, strength, *into)
    return into


def _check(op: str, frames: Tensor, *statistics: Tensor) -> None:
    check_video(op, frames)
    batch, channels, length = frames.shape[:3]
    if channels != 3:
        raise InputError(f"{op}: frames have {channels} channels; they must be red, green and blue")
    for x in statistics:
        fits = x.dim() == 5 and x.shape[0] in (1, batch) and x.shape[1] in (1, length)
        if not fits or x.shape[2:] != (3, 1, 1):
            wanted = f"[{batch} or 1, {length} or 1, 3, 1, 1]"
            raise InputError(f"{op}: a mean or deviation is {[*x.shape]}; it must be {wanted}")


def _check_into(frames: Tensor, matched: Tensor, pixels: Tensor) -> None:
    batch, _, length, height, width = frames.shape
    for name, tensor, shape, dtype, strides in (
        ("matched", matched, frames.shape, torch.float32, (width, 1)),
        ("pixels", pixels, (batch, length, height, width, 3), torch.uint8, (3 * width, 3, 1)),
    ):
        found = tensor.stride()[-len(strides) :]
        if tensor.shape != shape or tensor.dtype != dtype or found != strides:
            raise InputError(
                f"color_match_pixels: {name} is {tensor.dtype} {list(tensor.shape)} of strides {found}; it "
                f"must be {dtype} {list(shape)}, its pictures contiguous"
            )


def _video(
    batch: int, frames: int, height: int, width: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Smooth frames with some noise, in [-1, 1]."""
    shape = (batch, 3, frames, height, width)
    base = torch.randn((batch, 3, frames, 1, 1), generator=generator, device=device)
    return (base + 0.5 * torch.randn(shape, generator=generator, device=device)).tanh()


def _statistics_case(batch: int, frames: int, height: int, width: int, *, ndhwc: bool) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        video = _video(batch, frames, height, width, device, generator).to(dtype)
        return {"frames": video.contiguous(memory_format=torch.channels_last_3d) if ndhwc else video}

    return Case(f"{batch}x{frames}x{height}x{width}{' ndhwc' * ndhwc}", make)


def _match_case(batch: int, frames: int, height: int, width: int, strength: float, *, ndhwc: bool) -> Case:
    statistics = _statistics_case(batch, frames, height, width, ndhwc=ndhwc)

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        wanted = _video(1, 1, 16, 16, device, generator) * 0.5
        mean, std = reference.lab_statistics(wanted)
        return {
            **statistics.make(device, dtype, generator),
            "mean": mean,
            "std": std,
            "strength": strength,
        }

    return Case(f"{statistics.name} {strength:g}", make)


LAB_STATISTICS = OpSpec(
    "lab_statistics",
    (TRITON, TORCH),
    function=lab_statistics,
    reference=reference.lab_statistics,
    cases=(_statistics_case(2, 2, 7, 5, ndhwc=False), _statistics_case(1, 3, 50, 47, ndhwc=True)),
    workload=_statistics_case(1, 4, 768, 448, ndhwc=False),
    gradients=("frames",),
)
COLOR_MATCH = OpSpec(
    "color_match",
    (TRITON, TORCH),
    function=color_match,
    reference=reference.color_match,
    cases=(
        _match_case(2, 2, 7, 5, 1.0, ndhwc=False),
        _match_case(1, 1, 50, 47, 0.4, ndhwc=True),
    ),
    workload=_match_case(1, 4, 768, 448, 1.0, ndhwc=False),
    gradients=("frames", "mean", "std"),
)
COLOR_MATCH_PIXELS = OpSpec(
    "color_match_pixels",
    (TRITON, TORCH),
    function=color_match_pixels,
    reference=reference.color_match_pixels,
    cases=COLOR_MATCH.cases,
    workload=COLOR_MATCH.workload,
)

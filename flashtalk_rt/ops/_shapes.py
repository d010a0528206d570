"""What a kernel trusts: the shapes of tensors that go together."""

from __future__ import annotations

from torch import Tensor

from ..errors import InputError


def check_shape(name: str, x: Tensor | None, *shape: int) -> None:
    """InputError unless x, if there is one, has this shape."""
    if x is not None and tuple(x.shape) != shape:
        raise InputError(f"{name} is {[*x.shape]}; it must be {[*shape]}")


def check_video(op: str, x: Tensor) -> None:
    """InputError unless x is [B, C, T, H, W] with at least one frame."""
    if x.dim() != 5 or x.shape[2] == 0:
        raise InputError(f"{op}: x is {[*x.shape]}; it must be [B, C, T, H, W] with T from 1 on")

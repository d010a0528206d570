"""Options that several commands take, and InputErrors for values that cannot be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast, get_args

from .config import MAX_STEPS, SIZE_MULTIPLE, Precision
from .errors import InputError
from .modules.device import check_device_name as named_device
from .modules.device import usable_device

if TYPE_CHECKING:
    import torch

MAX_SIDE = 16_384  # pixels: libx264's
PRECISION_HELP = f"{' or '.join(get_args(Precision))}."


def check_settings(
    size: str | None, steps: int | None, precision: str | None
) -> tuple[int | None, int | None, Precision | None]:
    """Height, width and precision as given; InputError for what cannot be."""
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise InputError(f"--steps is {steps}; it must be from 1 to {MAX_STEPS}")
    height, width = parse_size(size) if size is not None else (None, None)
    return height, width, None if precision is None else parse_precision(precision)


def parse_size(text: str) -> tuple[int, int]:
    """ "768x448" -> (height, width); InputError otherwise."""
    match = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", text)
    if match is None:
        raise InputError(f"--size is {text!r}; give HEIGHTxWIDTH, such as 768x448")
    height, width = int(match[1]), int(match[2])
    for name, side in (("height", height), ("width", width)):
        near = round(min(max(side, SIZE_MULTIPLE), MAX_SIDE) / SIZE_MULTIPLE) * SIZE_MULTIPLE
        if side != near:
            raise InputError(
                f"--size {text}: {name} {side} is not a multiple of {SIZE_MULTIPLE} "
                f"from {SIZE_MULTIPLE} to {MAX_SIDE}; the nearest is {near}"
            )
    return height, width


def parse_precision(text: str, known: Sequence[str] = get_args(Precision)) -> Precision:
    if text not in known:
        raise InputError(f"--precision is {text!r}; use one of {', '.join(known)}")
    return cast(Precision, text)


def dtype_of(precision: Precision) -> torch.dtype:
    from .runtime.engine import DTYPES

    return DTYPES[precision]


def check_device_name(device: str | None) -> None:
    if device is not None:
        named_device(device, "--device")


def check_device(device: str | None) -> None:
    """InputError when `device` names a GPU that torch does not see."""
    usable_device(device, "--device")

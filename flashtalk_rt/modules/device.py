"""Which device, checked in one place for callers and for the options of commands.

torch is imported where it is used, so that the command can refuse a bad name without waiting for it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch


def check_device_name(device: object, name: str = "device") -> None:
    """InputError, which `name` begins, unless `device` is cpu, cuda or cuda:N."""
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d*))?", str(device)):
        raise InputError(f"{name} is {str(device)!r}; use cpu, cuda or cuda:N")


def usable_device(device: str | torch.device | None, name: str = "device") -> torch.device:
    """The device; None: CUDA where there is one, else the CPU.

    InputError, which `name` begins, for another name or a GPU that torch does not see.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device_name(device, name)
    kind, _, index = str(device).partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise InputError(
            f"{name} is {device}, but torch {torch.__version__} sees {count} CUDA devices; "
            "use cpu, or see `flashtalk doctor`"
        )
    return torch.device(device)

"""What samples may be, wherever they come from: a file or a caller.

torch is imported where it is used, so that the command can refuse a bad sound without waiting for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Floats can hold anything; beyond this (+120 dB) a sample is damage and would overflow the loudness.
MAX_AMPLITUDE = 1e6


def mono_block(samples: object) -> Tensor:
    """A copy of mono sound as float32 [n] on the host.

    samples: a numpy array (any float dtype, byte order and strides) or a torch tensor (any float dtype and
    device), [n], nominally in [-1, 1].  Raises InputError for anything else, and for a sample that is NaN,
    infinite or over `MAX_AMPLITUDE`.
    """
    import torch

    if isinstance(samples, torch.Tensor):
        is_float, kind, shape = samples.is_floating_point(), str(samples.dtype), samples.shape
    elif isinstance(samples, np.ndarray):
        is_float, kind, shape = samples.dtype.kind == "f", str(samples.dtype), samples.shape
    else:
        raise InputError(
            f"audio is of type {type(samples).__name__}; give mono float samples [n], numpy or torch"
        )
    if not is_float or len(shape) != 1:
        raise InputError(f"audio is {kind} {list(shape)}; give mono float samples [n]")
    if isinstance(samples, torch.Tensor):
        block = samples.detach().to("cpu", torch.float32, copy=True)
    else:
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            block = torch.from_numpy(np.array(samples, np.float32, order="C"))
    good = block.abs() <= MAX_AMPLITUDE  # false for NaN too
    if not bool(good.all()):
        at = int(good.logical_not().nonzero()[0])
        raise InputError(
            f"audio sample {at} of {block.numel()} is {float(block[at]):g}; samples must be finite and at "
            f"most {MAX_AMPLITUDE:g}, normally in -1..1"
        )
    return block

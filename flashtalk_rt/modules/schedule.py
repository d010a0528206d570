"""Timesteps of the few-step sampler and the two ways a step advances the latent."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from ..config import MAX_STEPS, Sampler
from ..errors import InputError

Time = TypeVar("Time", float, Tensor)


def shift_time(t: Time, shift: float) -> Time:
    """t' = s t / (1 + (s - 1) t) on the 0..1 scale: more of the steps at high noise."""
    return shift * t / (1 + (shift - 1) * t)


def timesteps(steps: int, shift: float = 5.0) -> list[float]:
    """Noise levels in [0, 1], `steps` + 1 of them, from 1 down to the final 0, already shifted.

    2 and 4 steps are the trained schedules (1000, 500 and 1000, 750, 500, 250 of 1000); any other
    count is evenly spaced from 1000 to 1.  Raises InputError for steps < 1 or > 1000.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps is {steps}; it must be from 1 to {MAX_STEPS}")
    match steps:
        case 2:
            times = [1000.0, 500.0]
        case 4:
            times = [1000.0, 750.0, 500.0, 250.0]
        case _:
            times = np.linspace(1000, 1, steps, dtype=np.float32).tolist()
    return [shift_time(t / 1000, shift) for t in (*times, 0.0)]


class Past(NamedTuple):
    """What the step before predicted, and at which noise level."""

    velocity: Tensor
    t: float


def advance(
    sampler: Sampler, x: Tensor, v: Tensor, t: float, s: float, noise: Tensor | None, past: Past | None
) -> Tensor:
    """One denoising step from noise level t to s, given the predicted velocity v = noise - clean.

    "renoise" (distilled weights) takes the clean estimate x - v t and noises it afresh to s, which
    is what the few-step student was trained for; `noise` is required.  "adams_bashforth" integrates
    dx/dt = v as a plain flow-matching model wants (renoising posterior means would shrink its variance),
    by the two-step method of that name for uneven steps: v is continued along the line through the
    `past` one.  Where there is none, in the first step, it is Euler's method.  x, v, noise: [B, C, T, H, W].
    """
    if sampler == "adams_bashforth":
        v = v.to(x.dtype)
        if past is not None:
            v = v + (s - t) / (2 * (t - past.t)) * (v - past.velocity)
        return x + v * (s - t)
    if noise is None:
        raise ValueError("the renoise sampler needs a noise tensor a step")
    return (1 - s) * (x - v * t) + s * noise

"""Pose, blink and gaze of a talking head as stationary random processes at 25 frames a second.

All of it is white noise through short causal filters (one convolution, no loop over time), so a clip
is stationary from its first frame and a thousand clips cost a few kernel launches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .face import MOTION_NAMES

FPS = 25
POSE_STD = 0.36  # of yaw, pitch, roll, shift_x, shift_y before clamping to [-1, 1]
POSE_TAU_S = 0.8  # time constant of the Ornstein-Uhlenbeck process
DRIVE_TAU_S = 0.14  # time constant of its driving noise: heads have inertia, white noise would jitter
BLINKS_PER_MINUTE = 18.0
BLINK_PROFILE = (0.35, 0.9, 1.0, 0.8, 0.45, 0.15)  # lid closure in the frames of one blink
SACCADES_HZ = 1.1
GAZE_STD = 0.4
GAZE_KERNEL = (0.3, 0.45, 0.25)  # a saccade's step response takes three frames

_POSE_NAMES = ("yaw", "pitch", "roll", "shift_x", "shift_y")


def pose_kernel() -> Tensor:
    """Impulse response [K] float32 of the pose process, K = 6 time constants, of unit energy.

    Two first-order low-passes in series, a^k * b^k = (a^(k+1) - b^(k+1)) / (a - b): an
    Ornstein-Uhlenbeck process driven by a faster one. Filtering unit white noise with it gives unit
    variance and the autocorrelation sum_k h[k] h[k + lag].
    """
    k = torch.arange(1, round(6 * POSE_TAU_S * FPS) + 1, dtype=torch.float64)
    a, b = (math.exp(-1 / (tau_s * FPS)) for tau_s in (POSE_TAU_S, DRIVE_TAU_S))
    response = (a**k - b**k) / (a - b)
    return (response / response.square().sum().sqrt()).float()


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution over time: [N, C, T + K - 1] with [K] -> [N, C, T]."""
    n, c, length = x.shape
    taps = kernel.to(x.device).flip(0).reshape(1, 1, -1)
    return F.conv1d(x.reshape(n * c, 1, length), taps).reshape(n, c, -1)


def sample_motion(
    count: int, frames: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Motion of `count` independent clips: [count, frames, 10] float32 on `device`, columns MOTION_NAMES.

    Pose and gaze lie in [-1, 1], blink in [0, 1]; the two mouth columns are zero (speech fills them).
    Random numbers are drawn on the generator's device, so one seed gives one result everywhere the
    generator is of the same kind.
    """
    where = generator.device
    kernel = pose_kernel()
    noise = torch.randn(count, len(_POSE_NAMES), frames + len(kernel) - 1, generator=generator, device=where)
    pose = (POSE_STD * _filter(noise.to(device), kernel)).clamp(-1, 1)

    lead = len(BLINK_PROFILE) - 1
    chance = BLINKS_PER_MINUTE / 60 / FPS
    starts = torch.rand(count, 1, frames + lead, generator=generator, device=where) < chance
    blink = _filter(starts.float().to(device), torch.tensor(BLINK_PROFILE)).clamp(0, 1)

    lead = len(GAZE_KERNEL) - 1
    length = frames + lead
    jumps = torch.rand(count, 1, length, generator=generator, device=where) < SACCADES_HZ / FPS
    targets = torch.randn(count, 2, length, generator=generator, device=where).mul(GAZE_STD).clamp(-1, 1)
    # Each frame looks at the target drawn at the latest jump; the first frame counts as one.
    latest = torch.where(jumps, torch.arange(length, device=where), 0).cummax(-1).values
    held = targets.gather(-1, latest.expand(-1, 2, -1))
    gaze = _filter(held.to(device), torch.tensor(GAZE_KERNEL))

    motion = torch.zeros(count, frames, len(MOTION_NAMES), device=device)
    motion[..., :5] = pose.transpose(1, 2)
    motion[..., 5:6] = blink.transpose(1, 2)
    motion[..., 6:8] = gaze.transpose(1, 2)
    return motion

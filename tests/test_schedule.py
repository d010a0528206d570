"""Timesteps against hand-computed values, and both samplers against what they integrate."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashtalk_rt.errors import InputError
from flashtalk_rt.modules.schedule import Past, advance, shift_time, timesteps


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [1, 0]),
        (2, [1, 5 * 0.5 / 3, 0]),
        # Of linspace(1000, 1, 3) the middle is 500.5, not the trained 500.
        (3, [1, 5 * 0.5005 / (1 + 4 * 0.5005), 5 * 0.001 / 1.004, 0]),
        (4, [1, 3.75 / 4, 2.5 / 3, 1.25 / 2, 0]),
    ],
)
def test_short_schedules(steps: int, expected: list[float]) -> None:
    assert timesteps(steps) == pytest.approx(expected, abs=1e-7)


def test_forty_steps() -> None:
    times = timesteps(40)
    assert len(times) == 41
    spaced = [(1000 - i * 999 / 39) / 1000 for i in range(40)]
    assert times[:-1] == pytest.approx([5 * t / (1 + 4 * t) for t in spaced], abs=1e-6)
    assert times[0] == 1 and times[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(times))


def test_shift() -> None:
    assert timesteps(4, shift=1.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert timesteps(4, shift=3.0) == pytest.approx([1, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5, 0])
    assert shift_time(0, 5) == 0 and shift_time(1, 5) == 1
    assert shift_time(0.2, 5) == pytest.approx(1 / 1.8)


@pytest.mark.parametrize("steps", [0, -1, -40, 1001, 10**20])
def test_too_few_or_many_steps_are_named(steps: int) -> None:
    with pytest.raises(InputError, match=f"steps is {steps}"):
        timesteps(steps)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (1, 4, 3, 2, 2)
    return torch.randn(shape, generator=g).double(), torch.randn(shape, generator=g).double()


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_adams_bashforth_integrates_a_straight_flow_exactly(steps: int) -> None:
    clean, noise = pair()
    times = timesteps(steps)
    x = noise
    past = None
    for t, s in itertools.pairwise(times):
        x = advance("adams_bashforth", x, noise - clean, t, s, None, past)
        past = Past(noise - clean, t)
        torch.testing.assert_close(x, (1 - s) * clean + s * noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-12)


def test_adams_bashforth_follows_a_velocity_that_changes_linearly() -> None:
    """dx/dt = t: from its second step on, where it knows the line, the method is exact, however uneven."""
    times = [0.9, 0.7, 0.6, 0.2, 0.0]
    x = torch.tensor(0.0, dtype=torch.float64)
    past = None
    ends = []
    for t, s in itertools.pairwise(times):
        x = advance("adams_bashforth", x, torch.tensor(t, dtype=torch.float64), t, s, None, past)
        past = Past(torch.tensor(t, dtype=torch.float64), t)
        ends.append(x.item())
    assert ends[-1] - ends[0] == pytest.approx((0.0**2 - 0.7**2) / 2, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_renoise_takes_the_clean_estimate_and_noises_it_afresh(steps: int) -> None:
    clean, noise = pair()
    times = timesteps(steps)
    x = noise
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        velocity = (x - clean) / t  # of the straight line from `clean` through x
        fresh = torch.randn(clean.shape, generator=torch.Generator().manual_seed(i)).double()
        x = advance("renoise", x, velocity, t, s, fresh, None)
        torch.testing.assert_close(x, (1 - s) * clean + s * fresh, rtol=0, atol=1e-12)
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-12)


def test_renoise_needs_noise() -> None:
    clean, noise = pair()
    with pytest.raises(ValueError, match="noise"):
        advance("renoise", noise, noise - clean, 1.0, 0.5, None, None)

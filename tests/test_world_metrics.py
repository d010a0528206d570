"""Every metric finds what it is for, and is not fooled by the cheat it names."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from flashtalk_rt.training.world import metrics


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Random walks that return, [..., T]."""
    noise = torch.randn(*shape[:-1], shape[-1] + 8, generator=generator(seed))
    return noise.unfold(-1, 9, 1).mean(-1)


def test_pearson_matches_numpy_and_constants_score_zero() -> None:
    a, b = smooth(3, 80), smooth(3, 80, seed=1) + 5
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert metrics.pearson(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert metrics.pearson(a, -3 * a + 1).tolist() == pytest.approx([-1] * 3)
    assert metrics.pearson(a, torch.full_like(a, 0.3)).tolist() == [0, 0, 0]
    assert metrics.pearson(torch.zeros(9), torch.zeros(9)).item() == 0
    assert math.isnan(metrics.pearson(torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([0.0, 1.0, 2.0])))


@pytest.mark.parametrize("shift", [-10, -3, 0, 1, 7, 10])
def test_lip_sync_finds_a_shift(shift: int) -> None:
    truth = smooth(4, 150)
    pred = 0.3 * truth.roll(shift, -1) + 0.1  # late by `shift`
    found = metrics.lip_sync(pred, truth)
    assert found.best_lag.tolist() == [shift] * 4
    assert found.best_r.tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    assert (found.r < 0.99).all() or shift == 0


def test_lip_sync_of_shuffled_and_still_mouths() -> None:
    truth = smooth(64, 560)
    shuffled = metrics.lip_sync(truth.roll(1, 0), truth)
    assert abs(shuffled.r.mean().item()) < 0.1
    still = metrics.lip_sync(torch.ones(2, 60), smooth(2, 60))
    assert still.r.tolist() == [0, 0] and still.best_lag.tolist() == [0, 0]
    with pytest.raises(ValueError, match="22 frames"):
        metrics.lip_sync(truth[..., :21], truth[..., :21])


def test_variance_ratio_sees_frozen_and_pooled_poses() -> None:
    truth = smooth(20, 100, seed=2)[..., None] * torch.tensor([1.0, 4.0])
    assert metrics.variance_ratio(truth, truth).tolist() == pytest.approx([1, 1])
    assert metrics.variance_ratio(truth * 0.5 + 3, truth).tolist() == pytest.approx([0.25, 0.25])
    frozen = truth[:, :1].expand(-1, 100, -1)  # a different pose in every clip, none of which moves
    assert metrics.variance_ratio(frozen, truth).max() < 1e-6


def test_theil_sen_is_the_median_slope_and_ignores_an_outlier() -> None:
    values = 0.02 * torch.arange(30) + 0.1 * torch.randn(30, generator=generator())
    slopes = [(values[j] - values[i]).item() / (j - i) for j in range(30) for i in range(j)]
    expected = float(np.median(slopes))
    assert metrics.theil_sen_slope(values).item() == pytest.approx(expected, abs=1e-6)
    line = torch.arange(30.0) * 0.5
    line[20] = 1e6
    assert metrics.theil_sen_slope(line).item() == pytest.approx(0.5, abs=0.05)


def test_identity_drift_is_not_a_constant_error() -> None:
    poor = torch.full((60,), 0.7)
    assert [v.item() for v in metrics.identity_drift(poor)] == [0, 0]
    rising = 0.1 + 0.01 * torch.arange(60.0)
    difference, slope = metrics.identity_drift(torch.stack([rising, rising.flip(0)]))
    assert difference.tolist() == pytest.approx([0.01 * (54.5 - 1), -0.01 * (54.5 - 1)], abs=1e-6)
    assert slope.tolist() == pytest.approx([0.01, -0.01], abs=1e-7)
    with pytest.raises(ValueError, match="13"):
        metrics.identity_drift(torch.zeros(12))


def test_boundary_ratio_finds_the_seam() -> None:
    joins = [28, 56, 84]
    frames = torch.arange(112.0)[:, None, None, None].expand(112, 3, 4, 4) * 0.01
    assert metrics.boundary_ratio(metrics.frame_change(frames), joins).item() == pytest.approx(1)
    jumping = frames.clone()
    for join in joins:
        jumping[join:] += 0.04
    assert metrics.boundary_ratio(metrics.frame_change(jumping), joins).item() == pytest.approx(5, rel=1e-3)
    assert metrics.boundary_ratio(
        metrics.frame_change(jumping), [j + 1 for j in joins]
    ).item() == pytest.approx(1, rel=1e-3)
    still = torch.zeros(112, 2)
    assert metrics.boundary_ratio(metrics.frame_change(still), joins).item() == 1
    still[28:] = 1
    assert metrics.boundary_ratio(metrics.frame_change(still), [28]).item() == math.inf
    clips = torch.stack([frames, jumping])
    assert metrics.boundary_ratio(metrics.frame_change(clips, 1), joins).tolist() == pytest.approx(
        [1, 5], rel=1e-3
    )
    for bad in ([], [0], [112]):
        with pytest.raises(ValueError, match="joins"):
            metrics.boundary_ratio(metrics.frame_change(frames), bad)


def test_psnr_matches_skimage_and_the_worst_frame_counts() -> None:
    a = torch.rand(2, 5, 3, 8, 8, generator=generator()) * 2 - 1
    b = (a + 0.1 * torch.randn(a.shape, generator=generator(1))).clamp(-1, 1)
    expected = peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=2)
    assert metrics.psnr(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert metrics.psnr(a, a).item() == math.inf
    per_frame = metrics.psnr(a, b, keep_dims=2)
    assert per_frame.shape == (2, 5)
    broken = b.clone()
    broken[1, 3] = -broken[1, 3]
    residual = metrics.residual_psnr(a, broken)
    assert residual[0] == per_frame[0].min()
    assert residual[1] == metrics.psnr(a[1, 3], broken[1, 3]) < per_frame[1].min()
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.psnr(a, b[:1])


def test_motion_energy() -> None:
    params = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    assert metrics.motion_energy(params).item() == pytest.approx((1 + 4) / 4)
    clips = torch.stack([params, params * 3])
    assert metrics.motion_energy(clips, time_dim=1).tolist() == pytest.approx([1.25, 11.25])


def test_collapse_rule() -> None:
    good, moving = torch.full((20,), 30.0), torch.ones(20)

    def low(*chunks: int) -> Tensor:
        out = good.clone()
        out[list(chunks)] = 21.9
        return out

    def fell(residual: Tensor, motion: Tensor = moving) -> bool:
        return bool(metrics.collapsed(residual, 28.0, motion))

    assert not fell(good)
    assert fell(low(17, 18, 19))
    assert not fell(low(2, 3, 5, 6))  # never three running
    assert not fell(torch.full((20,), 22.1))
    for ratio in (0.04, 5.1, torch.inf):
        assert fell(good, torch.cat([moving[:17], torch.full((3,), ratio)]))
        assert not fell(good, torch.cat([moving[:18], torch.full((2,), ratio)]))
    broken = good.clone()
    broken[4] = torch.nan
    assert fell(broken) and fell(good, broken * 0 + 1)
    assert metrics.collapsed(torch.stack([good, low(0, 1, 2)]), 28.0, torch.ones(2, 20)).tolist() == [
        False,
        True,
    ]


def test_frechet_of_identical_sets_is_zero_and_of_gaussians_known() -> None:
    a = torch.randn(500, 6, generator=generator()) @ torch.randn(6, 6, generator=generator(1))
    assert metrics.frechet(a, a).item() == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(a, a + 2).item() == pytest.approx(6 * 4, rel=1e-5)
    # Scaling about the mean by c: tr((1 - c)^2 A).
    centred = a - a.mean(0)
    trace = torch.cov(a.T).trace().item()
    assert metrics.frechet(centred, centred * 3).item() == pytest.approx(4 * trace, rel=1e-4)
    # Commuting covariances diag(1, 4) and diag(9, 1): (1 - 3)^2 + (2 - 1)^2, exact signs as samples.
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * math.sqrt(3 / 4)
    exact = metrics.frechet(signs * torch.tensor([1.0, 2]), signs * torch.tensor([3.0, 1]))
    assert exact.item() == pytest.approx(5, rel=1e-5)


def test_frechet_matches_numpy_on_singular_sets_and_sees_correlation() -> None:
    a, b = (
        torch.randn(5, 8, generator=generator()).double(),
        torch.randn(7, 8, generator=generator(1)).double(),
    )
    cov_a, cov_b = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    mean = float((a.mean(0) - b.mean(0)).square().sum())
    expected = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum()
    assert metrics.frechet(a, b).item() == pytest.approx(expected, rel=1e-5)
    together = torch.randn(4000, 1, generator=generator(2)).expand(-1, 2)
    apart = torch.stack([together[:, 0], together[:, 1].roll(1)], 1)  # the same margins
    assert metrics.frechet(together, apart) > 0.5
    assert metrics.frechet(together[:, :1], apart[:, :1]).item() == pytest.approx(0, abs=1e-6)


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(100):
        low, high = metrics.bootstrap_interval(
            torch.randn(64, generator=generator(seed)), generator(seed + 1000)
        )
        hits += bool(low <= 0 <= high)
    assert 85 <= hits <= 99
    values = torch.randn(64, generator=generator())
    low, high = metrics.bootstrap_interval(values, generator(7))
    assert (low, high) == metrics.bootstrap_interval(values, generator(7))
    error = values.double().std().item() / 8
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)

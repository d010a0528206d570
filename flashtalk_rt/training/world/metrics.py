"""Metrics on probed parameters and frames. Pure functions; each says which cheat it closes.

T is time in video frames, P a number of parameters. Everything is computed and returned in float64. A NaN
in gives a NaN out (or a collapse), never a good score. Wrong shapes and too few samples raise ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_FLAT = 1e-12  # variance under this part of the mean square is rounding, not movement

_LASTING_CHUNKS = 3


class LipSync(NamedTuple):
    """Per clip: correlation at lag 0, the lag (frames, int64) of the highest one, and that correlation."""

    r: Tensor
    best_lag: Tensor
    best_r: Tensor


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r over the last axis: [..., T], [..., T] -> [...] in [-1, 1]; 0 where either is constant.

    Closes: a mouth held still scores 0, not NaN and so not "left out of the average".
    """
    _check_pair(a, b, 2)
    a, b = a.double(), b.double()
    da, db = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    va, vb = da.square().mean(-1), db.square().mean(-1)
    flat = (va <= _FLAT * a.square().mean(-1)) | (vb <= _FLAT * b.square().mean(-1))
    r = (da * db).mean(-1) / torch.where(flat, 1.0, va * vb).sqrt()
    return torch.where(flat, 0.0, r.clamp(-1, 1))


def lip_sync(pred: Tensor, truth: Tensor, max_lag: int = 10) -> LipSync:
    """Correlation of the mouth with the speech, at lag 0 and at the best lag within +-max_lag frames.

    pred, truth: [..., T], T >= 2 max_lag + 2; a lag's r is taken over the frames that overlap, and a positive
    lag means that the mouth is late. Of equal correlations the smaller lag wins.

    Closes: a high r at a wrong lag (dubbing), and one score for all clips (a good clip hides a bad one).
    Alone it proves nothing: report it with shuffled audio and with swapped audio beside it.
    """
    _check_pair(pred, truth, 2 * max_lag + 2)
    length = pred.shape[-1]
    lags = sorted(range(-max_lag, max_lag + 1), key=abs)
    scores = []
    for lag in lags:
        late, early = max(lag, 0), max(-lag, 0)
        scores.append(pearson(pred[..., late : length - early], truth[..., early : length - late]))
    stacked = torch.stack(scores, -1)
    tie_break = 1e-9 * torch.tensor([abs(lag) for lag in lags], device=pred.device)
    best = (stacked - tie_break).argmax(-1, keepdim=True)
    best_lag = torch.tensor(lags, device=pred.device)[best[..., 0]]
    return LipSync(stacked[..., 0], best_lag, stacked.gather(-1, best)[..., 0])


def variance_ratio(pred: Tensor, truth: Tensor) -> Tensor:
    """Movement against the truth's: [clips, T, P] twice -> [P], 1 is right.

    The variance over time inside each clip, averaged over clips, then divided; the clip counts may differ.

    Closes: the average pose of all faces (ratio near 0) scores well on every mean error, and a different
    frozen pose in each clip looks diverse when clips are pooled. Also shows overshoot (above 1.3).
    """
    if pred.ndim != 3 or truth.ndim != 3 or pred.shape[2] != truth.shape[2]:
        raise ValueError(f"expected [clips, T, P] twice, got {list(pred.shape)} and {list(truth.shape)}")
    return pred.double().var(1).mean(0) / truth.double().var(1).mean(0)


def theil_sen_slope(values: Tensor) -> Tensor:
    """Median slope over all pairs of points, a step apart each: [..., T] -> [...] per step.

    Closes: a least-squares trend that one bad chunk makes or hides.
    """
    steps = values.shape[-1]
    if steps < 2:
        raise ValueError(f"a slope needs at least 2 values, got {steps}")
    first, second = torch.triu_indices(steps, steps, offset=1, device=values.device)
    values = values.double()
    slopes: Tensor = (values[..., second] - values[..., first]) / (second - first)
    return slopes.quantile(0.5, dim=-1)


def identity_drift(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Identity error a chunk, [..., chunks] -> (mean of the last 10 less mean of the first 3, slope a chunk).

    At least 13 chunks. Closes: a constant error (a poor start) passing for drift or hiding it, and a
    late collapse that a short run does not reach. Measure with colour matching off too, since it hides drift.
    """
    chunks = errors.shape[-1]
    if chunks < 13:
        raise ValueError(f"drift compares the last 10 chunks with the first 3: got {chunks} chunks, needs 13")
    errors = errors.double()
    return errors[..., -10:].mean(-1) - errors[..., :3].mean(-1), theil_sen_slope(errors)


def frame_change(series: Tensor, time_dim: int = 0) -> Tensor:
    """Mean absolute change to the next frame over the axes after `time_dim`: [..., T, ...] -> [..., T-1]."""
    step = series.double().diff(dim=time_dim).abs()
    return step if time_dim == step.ndim - 1 else step.flatten(time_dim + 1).mean(-1)


def boundary_ratio(change: Tensor, joins: Sequence[int]) -> Tensor:
    """Median motion into the first frame of a chunk over median motion elsewhere: [..., T-1] -> [...].

    change: `frame_change` of frames or of parameters. joins: each chunk's first frame (1..T-1), the first
    chunk's left out. 1 where no seam shows or nothing moves, inf where only the joins move.

    Closes: chunks that are each perfect but jump at the joins, which averages over all frames dilute 28-fold.
    """
    total = change.shape[-1]
    if not joins or len(set(joins)) >= total or not all(1 <= join <= total for join in joins):
        raise ValueError(f"joins must be frames in 1..{total} that leave others between, got {list(joins)}")
    at_join = torch.zeros(total, dtype=torch.bool, device=change.device)
    at_join[[join - 1 for join in joins]] = True
    change = change.double()
    seam, elsewhere = change[..., at_join].quantile(0.5, -1), change[..., ~at_join].quantile(0.5, -1)
    return torch.where((seam == 0) & (elsewhere == 0), 1.0, seam / elsewhere)


def psnr(a: Tensor, b: Tensor, keep_dims: int = 0) -> Tensor:
    """Peak signal-to-noise ratio in dB of frames in [-1, 1] (a range of 2), inf for equal inputs.

    Any shape, the same twice; one value per index of the first `keep_dims` axes, over all others together.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")
    error = (a.double() - b.double()).square()
    return 10 * torch.log10(4 / error.flatten(keep_dims).mean(-1))


def residual_psnr(rendered: Tensor, generated: Tensor) -> Tensor:
    """How much of each frame the renderer explains: [chunks, T, 3, H, W] in [-1, 1] twice -> [chunks] dB.

    `rendered` is drawn from what the probe read off `generated`. The worst frame of a chunk counts.

    Closes: frames that fool the probe without being faces (its parameters are right, the picture is not), and
    one broken frame among 27 good ones.
    """
    if rendered.ndim != 5:
        raise ValueError(f"expected frames [chunks, T, 3, H, W], got {list(rendered.shape)}")
    return psnr(rendered, generated, keep_dims=2).amin(1)


def motion_energy(series: Tensor, time_dim: int = 0) -> Tensor:
    """Mean square change to the next frame over time and every axis after it: [..., T, ...] -> [...].

    Divide by the truth's. Closes: a frozen face, whose residual and identity are perfect, and noise.
    """
    return series.double().diff(dim=time_dim).square().flatten(time_dim).mean(-1)


def collapsed(residual_psnr_db: Tensor, vae_p01_db: float, motion_energy_ratio: Tensor) -> Tensor:
    """Whether a clip fell apart: [..., chunks] residuals and motion ratios -> [...] bool.

    True where the residual is 6 dB or more under the VAE's first percentile (`vae_p01_db`, the same residual
    on VAE reconstructions) for 3 chunks running, where the motion energy is outside 0.05-5 times the
    truth's as long, or where anything is NaN.

    Closes: "no collapse" by eye, and by averages over a run that broke near its end.
    """
    if residual_psnr_db.shape != motion_energy_ratio.shape:
        raise ValueError(
            f"{list(residual_psnr_db.shape)} residuals for {list(motion_energy_ratio.shape)} motion ratios"
        )
    chunks = min(_LASTING_CHUNKS, residual_psnr_db.shape[-1])
    low = residual_psnr_db <= vae_p01_db - 6
    wild = (motion_energy_ratio < 0.05) | (motion_energy_ratio > 5)
    broken = torch.isnan(residual_psnr_db) | torch.isnan(motion_energy_ratio)

    def lasting(bad: Tensor) -> Tensor:
        return bad.unfold(-1, chunks, 1).all(-1).any(-1)

    return lasting(low) | lasting(wild) | broken.any(-1)


def frechet(a: Tensor, b: Tensor) -> Tensor:
    """Fréchet distance of the Gaussians fitted to two sets, [N, D] and [M, D] -> scalar, 0 when alike.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Dowson & Landau 1982; Heusel et al. 2017), sample
    covariances. It is biased upwards by small sets: print the floor of truth against truth at the same N.

    Closes: right one at a time and wrong together (variances match, but blinks, pose and mouth do not move as
    they do in the truth), and mode dropping that per-clip errors cannot see.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(a.shape[0], b.shape[0]) < 2:
        raise ValueError(f"expected [N, D] and [M, D], N and M at least 2: {list(a.shape)}, {list(b.shape)}")
    a, b = a.double(), b.double()
    size = a.shape[1]
    cov_a, cov_b = torch.cov(a.T).reshape(size, size), torch.cov(b.T).reshape(size, size)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance: Tensor = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.clamp(min=0)


def bootstrap_interval(values: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean, 10,000 draws: [N] -> (low, high), set by `generator`.

    Give one value an independent unit (a clip or an identity, not a frame). Closes: a difference within noise
    told as a finding, and intervals made narrow by counting the correlated frames of one clip.
    """
    if values.ndim != 1 or values.numel() < 2:
        raise ValueError(f"a bootstrap needs a list of at least 2 values, got shape {list(values.shape)}")
    count = values.numel()
    pick = torch.randint(count, (10_000, count), generator=generator, device=generator.device)
    means = values.double()[pick.to(values.device)].mean(1)
    return means.quantile(0.025).item(), means.quantile(0.975).item()


def _check_pair(a: Tensor, b: Tensor, least: int) -> None:
    if a.shape != b.shape or a.shape[-1] < least:
        raise ValueError(
            f"expected two series of one shape and at least {least} frames: {list(a.shape)}, {list(b.shape)}"
        )

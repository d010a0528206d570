"""The renderer and the motion processes: what every other number of the synthetic world rests on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashtalk_rt.training.world.face import (
    IDENTITY_NAMES,
    MOTION_NAMES,
    cavity_height,
    is_held_out,
    render,
    sample_identities,
)
from flashtalk_rt.training.world.motion import (
    BLINK_PROFILE,
    BLINKS_PER_MINUTE,
    FPS,
    GAZE_STD,
    POSE_STD,
    pose_kernel,
    sample_motion,
)

OPEN, ROUND, BLINK = (MOTION_NAMES.index(name) for name in ("mouth_open", "mouth_round", "blink"))
SIGNED = ("yaw", "pitch", "roll", "shift_x", "shift_y", "gaze_x", "gaze_y")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def middle(count: int = 1) -> tuple[Tensor, Tensor]:
    """An average face looking straight ahead with the mouth a little open."""
    motion = torch.zeros(count, 1, len(MOTION_NAMES))
    motion[..., OPEN] = 0.4
    return torch.full((count, len(IDENTITY_NAMES)), 0.5), motion


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 128), (128, 64), (768, 448), (448, 768)])
def test_any_size_gives_the_same_centred_face(height: int, width: int) -> None:
    identity, motion = middle()
    frames = render(identity, motion, height, width)
    assert frames.shape == (1, 1, 3, height, width)
    assert frames.dtype == torch.float32
    assert float(frames.min()) >= -1
    assert float(frames.max()) <= 1
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = frames[0, :, :, top : top + side, left : left + side]
    small = torch.nn.functional.interpolate(square, (32, 32), mode="area")
    expected = render(identity, motion, 512, 512)[0]
    expected = torch.nn.functional.interpolate(expected, (32, 32), mode="area")
    assert float((small - expected).square().mean()) < 1e-3  # 36 dB: the same picture


def test_sampling_and_drawing_repeat_under_a_seed() -> None:
    runs = []
    for _ in range(2):
        generator = seeded(3)
        identity = sample_identities(2, generator)
        motion = sample_motion(2, 5, generator)
        runs.append((identity, motion, render(identity, motion, 48, 48)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(sample_identities(2, seeded(3)), sample_identities(2, seeded(4)))


def test_passes_of_any_size_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    identity, motion = sample_identities(3, seeded()), sample_motion(3, 4, seeded())
    whole = render(identity, motion, 48, 48)
    monkeypatch.setattr("flashtalk_rt.training.world.face._MAX_PIXELS_CPU", 48 * 48)
    torch.testing.assert_close(render(identity, motion, 48, 48), whole, rtol=0, atol=1e-5)


def test_held_out_identities_are_never_drawn_in_training() -> None:
    seen, unseen = sample_identities(20_000, seeded()), sample_identities(20_000, seeded(1), held_out=True)
    assert not bool(is_held_out(seen).any())
    assert bool(is_held_out(unseen).all())
    share = is_held_out(torch.rand(20_000, 12, generator=seeded(2))).float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.02)
    for drawn in (seen, unseen):  # neither region loses part of any single parameter
        assert float(drawn.min()) >= 0
        assert float(drawn.max()) <= 1
        torch.testing.assert_close(drawn.mean(0), torch.full((12,), 0.5), rtol=0, atol=0.02)
        torch.testing.assert_close(drawn.std(0), torch.full((12,), 12**-0.5), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", IDENTITY_NAMES)
def test_identity_parameter_is_visible_and_monotone(name: str) -> None:
    identity, motion = middle(9)
    identity[:, IDENTITY_NAMES.index(name)] = torch.linspace(0, 1, 9)
    check_sweep(render(identity, motion, 96, 96)[:, 0])


@pytest.mark.parametrize("name", MOTION_NAMES)
def test_motion_parameter_is_visible_and_monotone(name: str) -> None:
    identity, motion = middle(9)
    low = -1.0 if name in SIGNED else 0.0
    motion[:, 0, MOTION_NAMES.index(name)] = torch.linspace(low, 1, 9)
    check_sweep(render(identity, motion, 96, 96)[:, 0])


def check_sweep(frames: Tensor) -> None:
    """Every step shows, and no picture of the sweep comes back to an earlier one."""
    apart = torch.cdist(frames.flatten(1), frames.flatten(1))
    changed = (frames[0] - frames[-1]).abs().amax(0) > 0.1
    assert int(changed.sum()) >= 20
    steps = apart.diagonal(1)
    assert float(steps.min()) > 0.1 * float(steps.mean())
    for i in range(len(frames) - 2):  # two steps away is further than one
        assert bool((apart[i, i + 2 :] > apart[i, i + 1] * 1.05).all())


def test_features_move_more_than_the_outline_under_yaw() -> None:
    identity, motion = middle(2)
    motion[:, 0, 0] = torch.tensor([-1.0, 1.0])
    frames = render(identity, motion, 192, 192)[:, 0]
    colour = torch.tensor((0.45, 0.0, 0.22)).reshape(3, 1, 1)
    columns = torch.arange(192.0)
    near = ((frames / 2 + 0.5 - colour).square().sum(1).sqrt() < 0.1).float().sum(1)
    mouth = (near * columns).sum(-1) / near.sum(-1)
    # The outline: the middle of all that differs from the background, at the height of the eyes.
    row = ((frames[:, :, 76] - frames[:, :, 76, :1]).abs().amax(1) > 0.4).float()
    outline = (row * columns).sum(-1) / row.sum(-1)
    assert float(mouth[1] - mouth[0]) > 15  # pixels of 192
    assert abs(float(outline[1] - outline[0])) < 0.5 * float(mouth[1] - mouth[0])


def test_cavity_height_measures_the_opening_over_identities_and_poses() -> None:
    generator = seeded(5)
    identity = sample_identities(120, generator)
    motion = sample_motion(120, 1, generator)
    motion[..., OPEN] = torch.rand(120, 1, generator=generator)
    motion[..., ROUND] = torch.rand(120, 1, generator=generator)
    measured = cavity_height(render(identity, motion, 96, 96))
    assert measured.shape == (120, 1)
    assert correlation(measured, motion[..., OPEN]) > 0.97
    motion[..., OPEN] = 0
    assert float(cavity_height(render(identity, motion, 96, 96)).max()) < 1e-3  # nothing else has its colour
    motion[..., OPEN] = 1
    assert float(cavity_height(render(identity, motion, 96, 96)).min()) > 0.04


def test_the_closed_eye_shows_no_iris_and_rounding_narrows_the_lips() -> None:
    identity, motion = middle(2)
    motion[1, 0, BLINK] = 1
    frames = render(identity, motion, 192, 192)[:, 0] / 2 + 0.5
    white = (frames.amin(1) > 0.93).flatten(1).sum(1)
    assert int(white[0]) > 8 * int(white[1])
    identity, motion = middle(2)
    motion[:, 0, ROUND] = torch.tensor([0.0, 1.0])
    frames = render(identity, motion, 192, 192)[:, 0] / 2 + 0.5
    colour = torch.tensor((0.45, 0.0, 0.22)).reshape(3, 1, 1)
    wide = ((frames - colour).square().sum(1).sqrt() < 0.1).any(1).sum(1)
    assert int(wide[1]) < 0.75 * int(wide[0])


def test_pictures_are_smooth_enough_for_a_small_vae() -> None:
    """Halving and doubling a 96 x 96 picture loses little: no detail hides below two pixels."""
    generator = seeded(6)
    identity = sample_identities(16, generator)
    frames = render(identity, sample_motion(16, 1, generator), 96, 96)[:, 0]
    half = torch.nn.functional.interpolate(frames, (48, 48), mode="bilinear", antialias=True)
    back = torch.nn.functional.interpolate(half, (96, 96), mode="bicubic")
    psnr_db = -10 * (frames - back).square().mean().div(4).log10()
    assert float(psnr_db) > 26


def test_gradients_reach_every_parameter() -> None:
    identity, motion = sample_identities(1, seeded(7)), torch.full((1, 1, 10), 0.3)
    identity.requires_grad_()
    motion.requires_grad_()
    render(identity, motion, 64, 64).square().mean().backward()
    for leaf in (identity, motion):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
        assert bool((leaf.grad != 0).all())


def test_pose_follows_its_theory() -> None:
    """Variance and autocorrelation of the filtered noise against the filter's own, from frame 0 on."""
    motion = sample_motion(3000, 40, seeded(8))
    assert motion.shape == (3000, 40, 10)
    pose = motion[..., :5]
    assert float(pose.abs().max()) <= 1
    for frame in (0, 39):  # stationary: the first frame is like any other
        torch.testing.assert_close(pose[:, frame].std(0), torch.full((5,), POSE_STD), rtol=0.05, atol=0)
    kernel = pose_kernel()
    for lag in (5, 12, 25):
        theory = float((kernel[:-lag] * kernel[lag:]).sum())
        measured = float((pose[:, lag:] * pose[:, :-lag]).mean() / pose.square().mean())
        assert measured == pytest.approx(theory, abs=0.03)
    ratio = float((kernel[:-25] * kernel[25:]).sum() / (kernel[:-50] * kernel[50:]).sum())
    assert -1 / math.log(1 / ratio) == pytest.approx(0.8, abs=0.1)  # decays with tau = 0.8 s
    across = torch.corrcoef(pose.flatten(0, 1).T) - torch.eye(5)
    assert float(across.abs().max()) < 0.05


def test_blinks_come_at_their_rate_and_last_six_frames() -> None:
    minutes = 400
    blink = sample_motion(minutes, 60 * FPS, seeded(9))[..., BLINK]
    assert float(blink.min()) >= 0
    assert float(blink.max()) == 1
    starts = (blink[:, 1:] > 0) & (blink[:, :-1] == 0)
    # A start within a running blink does not show: the rate seen is lambda * exp(-lambda * length).
    per_frame = BLINKS_PER_MINUTE / 60 / FPS
    expected = minutes * BLINKS_PER_MINUTE * (1 - per_frame) ** len(BLINK_PROFILE)
    assert abs(int(starts.sum()) - expected) < 4 * math.sqrt(expected)
    lengths = (blink > 0).sum() / starts.sum()
    assert 6 <= float(lengths) < 6.5


def test_gaze_holds_then_jumps_and_the_mouth_is_left_to_speech() -> None:
    motion = sample_motion(500, 100, seeded(10))
    gaze = motion[..., 6:8]
    assert float(gaze.abs().max()) <= 1
    assert float(gaze.std()) == pytest.approx(GAZE_STD, rel=0.1)
    still = ((gaze[:, 1:] - gaze[:, :-1]).abs() < 1e-6).float().mean()
    assert 0.8 < float(still) < 0.93
    assert not bool(motion[..., OPEN:].any())


@pytest.mark.gpu
def test_the_gpu_draws_what_the_cpu_draws() -> None:
    identity, motion = sample_identities(4, seeded()), sample_motion(4, 8, seeded())
    expected = render(identity, motion, 96, 96)
    torch.testing.assert_close(
        render(identity.cuda(), motion.cuda(), 96, 96).cpu(), expected, rtol=0, atol=2e-3
    )

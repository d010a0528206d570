"""Colour matching's kernels where float32 is hardest, against scikit-image and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_tensors import normal
from skimage.color import rgb2lab
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError
from flashtalk_rt.ops import reference

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's kernels are interpreted only where there is no GPU"
)
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = [
    ("cpu", "torch"),
    pytest.param("cpu", "triton", marks=INTERPRETED),
    pytest.param("cuda", "torch", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]


def exact_statistics(frames: Tensor) -> tuple[Tensor, Tensor]:
    """float64 mean and population deviation of scikit-image's Lab: two [B, T, 3, 1, 1]; its six digits of
    sRGB's primaries put a and b off by up to 5e-3."""
    rgb = (frames.double().cpu().permute(0, 2, 3, 4, 1) + 1) / 2
    lab = torch.from_numpy(np.asarray(rgb2lab(rgb.numpy()))).movedim(-1, 2)
    return lab.mean((-2, -1), keepdim=True), lab.std((-2, -1), correction=0, keepdim=True)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize(("level", "spread"), [(0.0, 0.3), (0.9, 0.002)], ids=["usual", "almost flat"])
def test_statistics_of_a_full_frame(level: float, spread: float, device: str, backend: str) -> None:
    """344,064 pixels: a sum of squares in float32 would lose the small deviation of bright pixels."""
    frames = (level + spread * normal(1, 3, 1, 768, 448)).clamp(-1, 1).to(device)
    mean, std = ops.lab_statistics(frames, backend=backend)
    exact_mean, exact_std = exact_statistics(frames)
    torch.testing.assert_close(mean.cpu().double(), exact_mean, rtol=1e-4, atol=6e-3)
    torch.testing.assert_close(std.cpu().double(), exact_std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_every_corner_of_the_cube(device: str, backend: str) -> None:
    """Each frame is one colour, and so its own mean: black, white, the primaries and both curves' ends."""
    levels = torch.tensor([0.0, 0.002, 0.04, 0.041, 0.2, 1.0])
    colors = torch.cartesian_prod(levels, levels, levels)
    frames = (colors.T[None, :, :, None, None] * 2 - 1).expand(-1, -1, -1, 2, 3).contiguous()
    mean, std = (x.cpu() for x in ops.lab_statistics(frames.to(device), backend=backend))
    np.testing.assert_allclose(mean[0, :, :, 0, 0].numpy(), rgb2lab(colors.double().numpy()), atol=6e-3)
    assert std.abs().max() < 1e-4
    # Grey has no colour, in the published digits; scikit-image's leave 5e-3, which 3 chunks make 1e-4 of 255.
    grey = (colors == colors[:, :1]).all(1)
    assert mean[0, grey, 1:].abs().max() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("level", [-1.0, -0.3, 0.0137, 1.0])
def test_a_flat_frame_has_no_deviation_at_all(level: float, device: str) -> None:
    """Else it would be scaled by the reference's deviation over a rounding error."""
    frames = torch.full((1, 3, 2, 67, 31), level, device=device)
    mean, std = ops.lab_statistics(frames, backend="triton")
    assert (std == 0).all()
    out = ops.color_match(frames, mean + 5, std + 20, 1.0, backend="triton")
    expected = reference.lab_to_rgb(mean + 5) * 2 - 1
    torch.testing.assert_close(out, expected.transpose(1, 2).expand_as(out), rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x[:, :, 1:],
        lambda x: x[..., 2:],
        lambda x: x.transpose(3, 4),
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        lambda x: x.expand(2, -1, -1, -1, -1),
    ],
    ids=["some frames", "some columns", "turned", "ndhwc", "repeated"],
)
def test_any_layout_is_read(layout: object, device: str) -> None:
    assert callable(layout)
    frames = layout(normal(1, 3, 3, 9, 11).tanh().to(device))
    wanted = reference.lab_statistics(normal(1, 3, 1, 8, 8, seed=1).to(device).tanh())
    out = ops.color_match(frames, *wanted, 0.7, backend="triton")
    torch.testing.assert_close(out, reference.color_match(frames, *wanted, 0.7), rtol=0, atol=2e-5)


@INTERPRETED
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_statistics_may_differ_by_video_and_by_frame(shape: tuple[int, int]) -> None:
    frames = normal(2, 3, 3, 5, 4).tanh()
    mean = 50 + 10 * normal(*shape, 3, 1, 1, seed=1)
    std = 10 + normal(*shape, 3, 1, 1, seed=2).abs()
    out = ops.color_match(frames, mean, std, 1.0, backend="triton")
    torch.testing.assert_close(out, reference.color_match(frames, mean, std, 1.0), rtol=0, atol=2e-5)


def test_strength_zero_is_the_frames_themselves() -> None:
    frames, statistics = normal(1, 3, 1, 4, 4), torch.ones(1, 1, 3, 1, 1)
    assert ops.color_match(frames, statistics, statistics, 0, backend="triton") is frames


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("strength", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixels_are_the_matched_frames_rounded(
    dtype: torch.dtype, strength: float, device: str, backend: str
) -> None:
    """Straight into slices of longer buffers, whose other frames stay."""
    frames = (2 * normal(1, 3, 2, 9, 11)).clamp(-1, 1).to(device, dtype)
    wanted = reference.lab_statistics(normal(1, 3, 1, 8, 8, seed=1).to(device).tanh())
    longer = torch.full((1, 3, 6, 9, 11), 7.0, device=device)
    pixels = torch.full((1, 6, 9, 11, 3), 7, dtype=torch.uint8, device=device)
    into = longer[:, :, 3:5], pixels[:, 3:5]
    found = ops.color_match_pixels(frames, *wanted, strength, into=into, backend=backend)
    assert all(mine is given for mine, given in zip(found, into, strict=True))
    exact = reference.color_match(frames.float(), *wanted, strength)
    torch.testing.assert_close(longer[:, :, 3:5], exact, rtol=0, atol=0 if strength == 0 else 2e-5)
    assert torch.equal(pixels[:, 3:5], reference.to_pixels(longer[:, :, 3:5]))
    assert (longer[:, :, :3] == 7).all() and (longer[:, :, 5:] == 7).all()
    assert (pixels[:, :3] == 7).all() and (pixels[:, 5:] == 7).all()
    alone = ops.color_match_pixels(frames, *wanted, strength, backend=backend)
    assert torch.equal(alone[0], longer[:, :, 3:5]) and torch.equal(alone[1], pixels[:, 3:5])


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_pixels_round_half_to_even(device: str, backend: str) -> None:
    """128.5, 127.5 and 126.5 (and the ends) exactly, which blending with the frames themselves keeps."""
    values = torch.tensor([128.5, 127.5, 126.5, 0.0, 255.0, 0.25]) / 127.5 - 1
    halves = ((values + 1) * 127.5).tolist()
    assert halves[1] == 127.5
    frames = values.expand(1, 3, 1, 1, 6).contiguous().to(device)
    statistics = ops.lab_statistics(frames, backend=backend)
    matched, pixels = ops.color_match_pixels(frames, *statistics, 1e-30, backend=backend)
    assert torch.equal(pixels, reference.to_pixels(matched))
    assert pixels[0, 0, 0, :, 0].tolist() == [128, 128, 126, 0, 255, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_the_registered_op_keeps_torchs_rules(device: str) -> None:
    frames, statistics = normal(1, 3, 2, 4, 6).tanh().to(device), torch.ones(1, 1, 3, 1, 1, device=device)
    matched, pixels = ops.color_match_pixels(frames, statistics, statistics, 0)
    args = (frames.requires_grad_(), statistics.requires_grad_(), statistics, 0.5, matched.clone(), pixels)
    # What it writes has no gradient, whatever its inputs want.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.flashtalk_rt.color_match_pixels.default, args, test_utils=tests)


@pytest.mark.parametrize("part", [0, 1])
def test_where_matched_frames_do_not_fit_is_refused(part: int) -> None:
    frames, statistics = normal(1, 3, 2, 4, 6), torch.ones(1, 1, 3, 1, 1)
    into = [torch.empty(1, 3, 2, 4, 6), torch.empty(1, 2, 4, 6, 3, dtype=torch.uint8)]
    into[part] = into[part].transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(InputError, match=("matched", "pixels")[part]):
        ops.color_match_pixels(frames, statistics, statistics, 1.0, into=(into[0], into[1]))

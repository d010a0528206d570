"""Synthetic speech: shaped like speech, reproducible, and with a mouth that moves as the definition says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from flashtalk_rt.modules.audio import loudness_lufs, normalize_loudness
from flashtalk_rt.training.world.metrics import lip_sync
from flashtalk_rt.training.world.speech import augment, mouth_truth, sample_speech

RATE_HZ = 16_000
FPS = 25


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def speech() -> Tensor:
    return sample_speech(12, 8.0, generator(0), "cpu")


def vowel(formants_hz: tuple[int, int], seconds: float = 1.0, f0_hz: float = 110.0) -> Tensor:
    """A steady vowel as a sum of harmonics under five resonances and a glottal slope, at -23 LUFS."""
    t = torch.arange(round(seconds * RATE_HZ)) / RATE_HZ
    out = torch.zeros_like(t)
    for k in range(1, int(5000 / f0_hz)):
        hz = k * f0_hz
        gain = (1 + (hz / 300) ** 2) ** -0.3
        for centre in (*formants_hz, 2500, 3500, 4500):
            gain *= centre**2 / math.hypot(hz**2 - centre**2, 100 * hz)
        out += gain * torch.cos(2 * math.pi * hz * t + k * k)
    return normalize_loudness(out, RATE_HZ, -23.0)


def test_speech_is_level_finite_and_reproducible(speech: Tensor) -> None:
    assert speech.shape == (12, 8 * RATE_HZ) and speech.dtype == torch.float32
    assert torch.isfinite(speech).all()
    torch.testing.assert_close(
        loudness_lufs(speech, RATE_HZ), torch.full((12,), -23.0).double(), atol=0.01, rtol=0
    )
    a, b = (sample_speech(2, 1.0, generator(5), "cpu") for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, sample_speech(2, 1.0, generator(6), "cpu"))


def test_speech_refuses_another_device() -> None:
    with pytest.raises(ValueError, match="generator is on cpu"):
        sample_speech(1, 1.0, generator(0), "meta")


def test_voices_differ_in_pitch(speech: Tensor) -> None:
    """Autocorrelation pitch of each clip's loudest stretch: from low to high voices."""
    loudest = speech.unfold(1, 4096, 1024)
    loudest = loudest[torch.arange(12), loudest.square().mean(2).argmax(1)]
    power = torch.fft.rfft(loudest, n=8192).abs().square()
    correlation = torch.fft.irfft(power)[:, RATE_HZ // 500 : RATE_HZ // 60]
    pitch_hz = RATE_HZ / (correlation.argmax(1) + RATE_HZ // 500)
    assert pitch_hz.max() > 1.8 * pitch_hz.min()


def test_mouth_uses_its_range_and_closes_in_pauses(speech: Tensor) -> None:
    mouth = mouth_truth(speech, RATE_HZ, FPS)
    assert mouth.shape == (12, 200, 2)
    assert mouth.min() >= 0 and mouth.max() <= 1
    opening, rounding = mouth.unbind(-1)
    assert opening.std() >= 0.15 and rounding.std() >= 0.1
    low, high = opening.quantile(0.05), opening.quantile(0.95)
    assert low < 0.05 and high > 0.75
    energy = speech.unflatten(1, (200, 640)).square().mean(2)
    silent = energy.unfold(1, 7, 1).amax(2) < 1e-7  # three quiet frames on either side
    assert silent.any() and opening[:, 3:-3][silent].max() < 1e-3


def test_mouth_follows_syllables(speech: Tensor) -> None:
    """A good part of the movement is at syllable rate (over 2 Hz), not only in phrases."""
    opening = mouth_truth(speech, RATE_HZ, FPS)[..., 0]
    power = torch.fft.rfft(opening - opening.mean(1, keepdim=True)).abs().square().mean(0)
    hz = torch.linspace(0, FPS / 2, power.numel())
    assert power[hz > 2].sum() / power.sum() > 0.15


def test_opening_is_logarithmic_in_level_and_mild() -> None:
    steady = vowel((640, 1190))
    levels = [mouth_truth(steady * 10 ** (db / 20), RATE_HZ, FPS)[12, 0].item() for db in (-6, -3, 0, 3)]
    steps = [b - a for a, b in itertools.pairwise(levels)]
    assert steps == pytest.approx([3 / 28] * 3, abs=0.01)
    assert not mouth_truth(torch.zeros(RATE_HZ), RATE_HZ, FPS).any()


def test_rounding_tells_vowels_apart() -> None:
    """u and o are round, a is half so, e and i are not."""
    rounding = {
        name: mouth_truth(vowel(formants), RATE_HZ, FPS)[12, 1].item()
        for name, formants in {
            "u": (300, 870),
            "o": (570, 840),
            "a": (730, 1090),
            "e": (530, 1840),
            "i": (270, 2290),
        }.items()
    }
    assert min(rounding["u"], rounding["o"]) > 0.7
    assert 0.2 < rounding["a"] < min(rounding["u"], rounding["o"]) - 0.1
    assert max(rounding["e"], rounding["i"]) < 0.15


def test_mouth_is_on_time_and_spreads_three_frames() -> None:
    sound = torch.zeros(50 * 640)
    sound[20 * 640 : 30 * 640] = vowel((640, 1190))[: 10 * 640]
    opening = mouth_truth(sound, RATE_HZ, FPS)[:, 0]
    torch.testing.assert_close(opening[:50], opening.flip(0), atol=0.05, rtol=0)  # symmetric in time
    assert opening[:16].max() == 0 and opening[34:].max() == 0
    assert 0 < opening[18] < opening[20] < opening[22]
    assert opening[24] > 0.6


def test_mouth_shifts_with_the_sound(speech: Tensor) -> None:
    late = torch.cat([torch.zeros(12, 4 * 640), speech], 1)[:, : speech.shape[1]]
    found = lip_sync(mouth_truth(late, RATE_HZ, FPS)[..., 0], mouth_truth(speech, RATE_HZ, FPS)[..., 0])
    assert (found.best_lag == 4).all()


def test_leading_axes_of_the_mouth(speech: Tensor) -> None:
    batch = mouth_truth(speech.view(3, 4, -1), RATE_HZ, FPS)
    torch.testing.assert_close(batch[2, 1], mouth_truth(speech[9], RATE_HZ, FPS))


def test_augmentation_keeps_the_speech_in_place(speech: Tensor) -> None:
    heard = augment(speech, generator(1))
    assert heard.shape == speech.shape and torch.isfinite(heard).all()
    assert torch.equal(heard, augment(speech, generator(1)))
    level = normalize_loudness(heard, RATE_HZ, -23.0)
    sync = lip_sync(mouth_truth(level, RATE_HZ, FPS)[..., 0], mouth_truth(speech, RATE_HZ, FPS)[..., 0])
    assert (sync.best_lag.abs() <= 1).all()
    assert sync.r.min() > 0.5 and sync.r.mean() > 0.85
    change_db = loudness_lufs(heard, RATE_HZ) - loudness_lufs(speech, RATE_HZ)
    assert change_db.std() > 3
    relative = (heard / heard.norm(dim=1, keepdim=True) - speech / speech.norm(dim=1, keepdim=True)).norm(
        dim=1
    )
    assert relative.min() > 0.01


@pytest.mark.gpu
def test_speech_on_a_gpu_is_quick() -> None:
    device_generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        clean = sample_speech(64, 10.0, device_generator, "cuda")
        augment(clean, device_generator)
        mouth_truth(clean, RATE_HZ, FPS)
        end.record()
        torch.cuda.synchronize()
    assert torch.isfinite(clean).all()
    assert start.elapsed_time(end) < 500

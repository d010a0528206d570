"""Loudness against pyloudnorm, mel against librosa, and the ring and windows against plain indexing."""

from __future__ import annotations

import librosa
import numpy as np
import pyloudnorm
import pytest
import torch
from torch import Tensor

from flashtalk_rt.errors import InputError
from flashtalk_rt.modules.audio import AudioRing, audio_windows, loudness_lufs, normalize_loudness
from flashtalk_rt.modules.toy_encoders import MelAudioEncoder, NullTextEncoder, PatchImageEncoder, mel_filters

RATE_HZ = 16_000


def babble(seconds: float, rate_hz: int, seed: int = 0) -> Tensor:
    """Noise with a falling spectrum, switched in syllables: [N] float32."""
    rng = np.random.default_rng(seed)
    n = round(seconds * rate_hz)
    t = np.arange(n) / rate_hz
    noise = rng.standard_normal(n)
    for tap in (0.9, 0.5):
        noise = noise + tap * np.roll(noise, 1)
    return torch.tensor(
        0.05 * noise * (np.sin(2 * np.pi * 1.7 * t) > -0.3) * np.exp(np.sin(t)), dtype=torch.float32
    )


def with_silence(samples: Tensor, part: str) -> Tensor:
    third = samples.numel() // 3
    out = samples.clone()
    if part == "zero prefix":
        out[: 2 * third] = 0
    elif part == "pause":
        out[third : 2 * third] = 0
    elif part == "quiet half":
        out[third:] *= 0.01
    elif part == "faint":  # about -64 LUFS, and a part of it between the two gates
        out *= 0.006
        out[third:] *= 0.35
    return out


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("part", ["none", "zero prefix", "pause", "quiet half", "faint"])
def test_loudness_matches_pyloudnorm(rate_hz: int, part: str) -> None:
    samples = with_silence(babble(8.03, rate_hz), part)
    expected = pyloudnorm.Meter(rate_hz).integrated_loudness(samples.double().numpy())
    assert loudness_lufs(samples, rate_hz).item() == pytest.approx(expected, abs=1e-4)


def test_loudness_of_short_low_and_batched_sound() -> None:
    clips = torch.stack([babble(0.41, RATE_HZ), babble(0.41, RATE_HZ, 1) * 0.03, torch.full((6560,), 0.2)])
    expected = [pyloudnorm.Meter(RATE_HZ).integrated_loudness(clip.double().numpy()) for clip in clips]
    assert loudness_lufs(clips.view(3, 1, -1), RATE_HZ).flatten().tolist() == pytest.approx(
        expected, abs=1e-4
    )


def test_silence_is_minus_infinity_and_left_alone() -> None:
    for quiet in (torch.zeros(RATE_HZ), torch.randn(RATE_HZ) * 1e-6):
        assert loudness_lufs(quiet, RATE_HZ).item() == -torch.inf
        assert torch.equal(normalize_loudness(quiet, RATE_HZ, -23.0), quiet)


def test_too_short_for_a_block() -> None:
    with pytest.raises(InputError, match=r"0\.4 s"):
        loudness_lufs(torch.zeros(6399), RATE_HZ)


def test_normalisation_gives_each_clip_its_gain() -> None:
    speech = babble(3, RATE_HZ)
    clips = torch.stack([speech, speech * 0.02, torch.zeros_like(speech)])
    level = normalize_loudness(clips, RATE_HZ, -23.0)
    assert loudness_lufs(level, RATE_HZ)[:2].tolist() == pytest.approx([-23, -23], abs=1e-3)
    torch.testing.assert_close(level[0], level[1], rtol=1e-4, atol=1e-6)
    assert level.dtype == torch.float32 and not level[2].any()
    meter = pyloudnorm.Meter(RATE_HZ)
    data = speech.double().numpy()
    expected = pyloudnorm.normalize.loudness(data, meter.integrated_loudness(data), -23.0)
    np.testing.assert_allclose(level[0].numpy(), expected, atol=1e-5)


def test_normalisation_does_not_clip() -> None:
    sparse = torch.zeros(4 * RATE_HZ)
    sparse[::4000] = 0.5
    assert normalize_loudness(sparse, RATE_HZ, -10.0).max() > 1


def test_windows_take_the_last_frames_and_clamp_to_the_ring() -> None:
    features = torch.arange(40.0)[:, None, None].expand(40, 3, 2)
    windows = audio_windows(features, 33)
    assert windows.shape == (1, 33, 5, 3, 2)
    index = windows[0, :, :, 0, 0]
    assert index[0].tolist() == [5, 6, 7, 8, 9]  # the frame is 7; earlier audio of the ring is used
    assert index[-1].tolist() == [37, 38, 39, 39, 39]
    assert audio_windows(features, 40)[0, 0, :, 0, 0].tolist() == [0, 0, 0, 1, 2]
    assert audio_windows(features, 2, window=3)[0, :, :, 0, 0].tolist() == [[37, 38, 39], [38, 39, 39]]
    with pytest.raises(ValueError, match="41 frames"):
        audio_windows(features, 41)


@pytest.mark.parametrize("sizes", [[3, 5, 1], [100], [0, 10, 250, 7], [99, 1, 1]])
def test_ring_holds_the_last_samples(sizes: list[int]) -> None:
    ring = AudioRing(1.0, 100)
    assert not ring.samples().any()
    stream = torch.randn(sum(sizes))
    for piece in stream.split(sizes):
        ring.push(piece.double())
    expected = torch.cat([torch.zeros(100), stream])[-100:]
    assert torch.equal(ring.samples(), expected)
    assert ring.samples().untyped_storage().nbytes() == 400


def test_ring_storage_does_not_keep_what_was_pushed() -> None:
    ring = AudioRing(1.0, 100)
    big = torch.randn(10_000)
    ring.push(big)
    kept = ring.samples()
    big.zero_()
    assert torch.equal(ring.samples(), kept) and kept.any()


@pytest.mark.parametrize("bad", [torch.tensor([0.0, torch.nan]), torch.tensor([torch.inf, 0.0])])
def test_ring_rejects_non_finite_sound_whole(bad: Tensor) -> None:
    ring = AudioRing(1.0, 100)
    ring.push(torch.ones(10))
    before = ring.samples()
    with pytest.raises(InputError, match=r"nan|inf"):
        ring.push(bad)
    assert torch.equal(ring.samples(), before)


@pytest.mark.parametrize("bad", [torch.zeros(2, 5), torch.zeros(5, dtype=torch.int16)])
def test_ring_rejects_stereo_and_integers(bad: Tensor) -> None:
    with pytest.raises(InputError, match="mono float"):
        AudioRing(1.0, 100).push(bad)


def test_mel_matches_librosa() -> None:
    filters = librosa.filters.mel(sr=RATE_HZ, n_fft=400, n_mels=40, htk=True, norm=None)
    np.testing.assert_allclose(mel_filters(RATE_HZ, 400, 40).T.numpy(), filters, atol=1e-5)
    samples = normalize_loudness(babble(2, RATE_HZ), RATE_HZ, -23.0)
    ours = MelAudioEncoder(RATE_HZ, 25)(samples, 50)
    assert ours.shape == (50, 4, 40)
    # Sub-frame s of frame f is centred on sample 640 f + 160 s + 80. (librosa's own STFT compiles for 30 s.)
    padded = np.pad(samples.double().numpy(), 200)
    for row, spectrum in enumerate(ours.flatten(0, 1).numpy()):
        start = row * 160 + 80
        piece = padded[start : start + 400] * librosa.filters.get_window("hann", 400)
        theirs = np.log10(filters @ np.abs(np.fft.rfft(piece)) ** 2 + 0.05)
        np.testing.assert_allclose(spectrum, (theirs + 0.65) / 0.87, atol=1e-4)


def test_mel_is_batched_on_time_and_bounded() -> None:
    encoder = MelAudioEncoder(RATE_HZ, 25)
    clips = torch.stack([babble(1, RATE_HZ), babble(1, RATE_HZ, 1), torch.zeros(RATE_HZ)])
    batch = encoder(clips, 25)
    torch.testing.assert_close(batch[1], encoder(clips[1], 25))
    silence = batch[2].unique()
    assert silence.numel() == 1 and -1 < silence.item() < -0.5
    assert batch.min() >= silence.item() - 1e-6
    click = torch.zeros(RATE_HZ)
    click[10 * 640 + 2 * 160 + 80] = 1  # the middle of frame 10's third sub-frame
    energy = encoder(click, 25).sum(-1)
    assert energy.flatten().argmax().item() == 10 * 4 + 2
    with pytest.raises(ValueError, match="15360 samples"):
        encoder(click, 24)
    with pytest.raises(ValueError, match="divide"):
        MelAudioEncoder(RATE_HZ, 30)


def test_patches_of_the_portrait() -> None:
    image = torch.rand(2, 3, 1, 96, 144) * 2 - 1
    tokens = PatchImageEncoder()(image)
    assert tokens.shape == (2, 257, 27)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    # Row 1, column 2 of the grid covers rows 6..11 and columns 18..26; each small pixel is a 2 x 3 mean.
    block = image[1, :, 0, 6:12, 18:27].reshape(3, 3, 2, 3, 3).mean((2, 4))
    torch.testing.assert_close(tokens[1, 1 + 16 + 2], block.flatten())


def test_no_text() -> None:
    assert NullTextEncoder(24)("A person is talking.").shape == (0, 24)

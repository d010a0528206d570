"""Speech for the talking-face world: synthesised in bulk, degraded for the ear, measured for the mouth.

Three functions, used in this order: `sample_speech` makes clean speech, `mouth_truth` says what the mouth
does while it is spoken, `augment` makes what the model hears of it. Everything is batched over clips.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modules.audio import normalize_loudness

SAMPLE_RATE_HZ = 16_000
LOUDNESS_LUFS = -23.0  # of clean speech, at which `mouth_truth` is defined

_HOP = 80  # control tracks move every 5 ms
_N_FFT = 512
_WINDOW = 320
_SILENT_DB = -90.0

# Formants F1-F3 in Hz of ten American English vowels, men's averages (Peterson & Barney, JASA 24, 1952).
_VOWELS = (
    (270, 2290, 3010), (390, 1990, 2550), (530, 1840, 2480), (660, 1720, 2410), (730, 1090, 2440),
    (570, 840, 2410), (440, 1020, 2240), (300, 870, 2240), (640, 1190, 2390), (490, 1350, 1690),
)  # fmt: skip

# F1, F2, F3 (Hz), voicing (dB against a vowel), noise (dB), noise band (Hz, Hz), length (ms, ms), closure
# before it (ms, ms). Levels and bands are textbook values, rounded.
_CONSONANTS = (
    (300, 1700, 2600, _SILENT_DB, 4, 4200, 8000, 70, 140, 0, 0),  # s
    (300, 1800, 2500, _SILENT_DB, 6, 2000, 6000, 70, 140, 0, 0),  # sh
    (300, 1300, 2400, _SILENT_DB, -10, 1200, 8000, 60, 120, 0, 0),  # f, th
    (500, 1500, 2500, _SILENT_DB, -6, 500, 4000, 40, 80, 0, 0),  # h
    (280, 1600, 2500, -12, -8, 3500, 8000, 50, 100, 0, 0),  # z, v
    (270, 1500, 2400, -10, _SILENT_DB, 1000, 8000, 50, 100, 0, 0),  # n
    (250, 1000, 2300, -12, _SILENT_DB, 1000, 8000, 50, 110, 0, 0),  # m
    (370, 1200, 2500, -5, _SILENT_DB, 1000, 8000, 40, 80, 0, 0),  # l
    (350, 1100, 1650, -5, _SILENT_DB, 1000, 8000, 40, 80, 0, 0),  # r
    (300, 700, 2200, -6, _SILENT_DB, 1000, 8000, 50, 90, 0, 0),  # w
    (280, 2200, 3000, -6, _SILENT_DB, 1000, 8000, 50, 90, 0, 0),  # y
    (350, 800, 2300, _SILENT_DB, 2, 500, 2000, 8, 30, 50, 110),  # p, b
    (350, 1700, 2600, _SILENT_DB, 6, 2500, 7500, 8, 40, 50, 110),  # t, d
    (350, 1900, 2500, _SILENT_DB, 4, 1200, 3500, 10, 50, 50, 110),  # k, g
    (500, 1500, 2500, _SILENT_DB, _SILENT_DB, 1000, 8000, 0, 0, 0, 0),  # none
)
_CODA_P = 0.4
_PAUSE_P = 0.1


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def _smooth(tracks: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing along the last axis of [B, T]; sigma in steps, the ends repeated."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=tracks.device) / sigma) ** 2)
    padded = F.pad(tracks[:, None], (radius, radius), mode="replicate")
    return F.conv1d(padded, (kernel / kernel.sum())[None, None])[:, 0]


def _phones(count: int, syllables: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random utterances as phone segments: lengths [count, S] in ms and targets [count, S, 8].

    A syllable is seven segments, any of which may be 0 ms long: closure, onset, vowel (begin, end), closure,
    coda, pause. Targets: F1, F2, F3 (Hz), voicing (dB), noise (dB), noise band (Hz, Hz), pitch (semitones).
    """
    device = generator.device
    shape = (count, syllables)
    table = torch.tensor(_CONSONANTS, dtype=torch.float32, device=device)
    vowels = torch.tensor(_VOWELS, dtype=torch.float32, device=device)

    def consonant(absent_p: float) -> Tensor:
        pick = torch.randint(len(_CONSONANTS) - 1, shape, generator=generator, device=device)
        absent = torch.rand(shape, generator=generator, device=device) < absent_p
        return table[torch.where(absent, len(_CONSONANTS) - 1, pick)]

    def vowel() -> Tensor:
        pick = torch.randint(len(_VOWELS), (2, *shape), generator=generator, device=device)
        return torch.lerp(vowels[pick[0]], vowels[pick[1]], _uniform(0, 0.4, (*shape, 1), generator))

    def span(low: Tensor | float, high: Tensor | float) -> Tensor:
        return low + (high - low) * _uniform(0, 1, shape, generator)

    onset, coda, begin, end = consonant(0.12), consonant(1 - _CODA_P), vowel(), vowel()
    end = torch.where(_uniform(0, 1, (*shape, 1), generator) < 0.3, end, begin)  # a diphthong, sometimes
    paused = _uniform(0, 1, shape, generator) < _PAUSE_P
    half_ms = span(25, 110)
    lengths = torch.stack(
        [span(onset[..., 9], onset[..., 10]), span(onset[..., 7], onset[..., 8]), half_ms, half_ms,
         span(coda[..., 9], coda[..., 10]), span(coda[..., 7], coda[..., 8]),
         torch.where(paused, span(120, 700), 0.0)], -1,
    )  # fmt: skip

    stress_db = _uniform(-7, 3, (*shape, 1), generator)
    fade_db = _uniform(-6, 6, (2, *shape, 1), generator).relu()  # half of the vowels swell, half die away
    pitch = torch.randn((*shape, 1), generator=generator, device=device) * 1.8 + 0.3 * stress_db
    band = torch.tensor([1000.0, 8000.0], device=device).expand(*shape, 2)
    silent = torch.full_like(stress_db, _SILENT_DB)

    def closed(consonant: Tensor) -> Tensor:  # a voice bar for about half of them: b, d, g
        voiced = _uniform(0, 1, (*shape, 1), generator) < 0.5
        return torch.cat([consonant[..., :3], torch.where(voiced, -26.0, silent), silent, band, pitch], -1)

    def sounded(consonant: Tensor) -> Tensor:
        level = consonant[..., 3:5] + stress_db + _uniform(-6, 6, (*shape, 2), generator)
        return torch.cat([consonant[..., :3], level, consonant[..., 5:7], pitch], -1)

    def open_(formants: Tensor, fade_db: Tensor) -> Tensor:
        return torch.cat([formants, stress_db - fade_db, silent, band, pitch], -1)

    pause = torch.cat([end, silent, silent, band, pitch - 2], -1)
    vowel_begin, vowel_end = open_(begin, fade_db[0]), open_(end, fade_db[1])
    targets = [closed(onset), sounded(onset), vowel_begin, vowel_end, closed(coda), sounded(coda), pause]
    return lengths.flatten(1), torch.stack(targets, 2).flatten(1, 2)


def sample_speech(
    count: int, seconds: float, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Clean synthetic speech, [count, seconds * 16000] float32 at -23 LUFS, every clip another speaker.

    Source-filter synthesis on short-time spectra: a band-limited pulse train (pitch 65-480 Hz with accents,
    drift and jitter) and noise, shaped by seven resonances, three of them moving, or by a fricative's band,
    following random syllables with closures and pauses; a timbre of its own (+-8 dB over the octaves) a clip.
    `generator` lives on `device`; it alone decides the result. ValueError if it lives elsewhere.
    """
    if torch.device(device).type != generator.device.type:
        raise ValueError(f"the generator is on {generator.device}, the speech was asked for on {device}")
    device = generator.device
    n = round(seconds * SAMPLE_RATE_HZ)
    steps = n // _HOP + 1
    one = (count, 1)

    # A longer vocal tract means lower formants and, loosely, a lower voice.
    tract = _uniform(0.9, 1.35, one, generator)
    f0_base = 105 * tract**2.6 * 2 ** (torch.randn(one, generator=generator, device=device) * 0.25)
    rate = _uniform(0.75, 1.4, one, generator)

    lengths_ms, targets = _phones(count, math.ceil(seconds * 12) + 6, generator)
    ends_s = (lengths_ms / rate / 1000).cumsum(1)
    clock_s = torch.arange(steps, device=device) * (_HOP / SAMPLE_RATE_HZ)
    clock_s = clock_s + _uniform(-0.5, 1.5, one, generator)
    segment = torch.searchsorted(ends_s, clock_s, right=True).clamp(max=ends_s.shape[1] - 1)
    tracks = targets.gather(1, segment[..., None].expand(-1, -1, targets.shape[2])).unbind(-1)
    formants = [_smooth(track.log(), 3.0).exp() * tract for track in tracks[:3]]
    voiced = _smooth(10 ** (tracks[3] / 20), 1.6)
    noisy = _smooth(10 ** (tracks[4] / 20), 1.0)

    wander = _smooth(torch.randn((count, steps), generator=generator, device=device), 60.0) * 15
    jitter = torch.randn((count, steps), generator=generator, device=device) * 0.15
    semitones = _smooth(tracks[7], 10.0) + wander + jitter
    f0_hz = (f0_base * 2 ** (semitones / 12)).clamp(65, 480)

    window = torch.hann_window(_WINDOW, device=device)
    pulses = torch.stft(_pulse_train(f0_hz, n, generator), _N_FFT, _HOP, _WINDOW, window, return_complex=True)
    hiss = torch.randn((count, n), generator=generator, device=device)
    noise = torch.stft(hiss, _N_FFT, _HOP, _WINDOW, window, return_complex=True)

    hz = torch.linspace(0, SAMPLE_RATE_HZ / 2, _N_FFT // 2 + 1, device=device)[:, None]
    throat = _resonances(hz, formants, tract, generator) * voiced[:, None]
    breath = 10 ** (_uniform(-40, -14, one, generator) / 20)
    low, high = tracks[5][:, None] * tract[:, None].sqrt(), tracks[6][:, None]
    band = ((1 + (low / hz.clamp(min=1)) ** 6) * (1 + (hz / high) ** 6)).rsqrt()
    hiss_level = 10 ** (_uniform(-16, -4, one, generator) / 20)
    spectrum = pulses * throat + noise * (breath[..., None] * throat + (hiss_level * noisy)[:, None] * band)
    spectrum = spectrum * _timbre(hz[:, 0], count, generator)[..., None]
    speech = torch.istft(spectrum, _N_FFT, _HOP, _WINDOW, window, length=n)
    return normalize_loudness(speech, SAMPLE_RATE_HZ, LOUDNESS_LUFS)


def _pulse_train(f0_hz: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """f0 [B, T] -> [B, n]: equal cosines at every harmonic below 7.6 kHz, at the spectral density of
    unit white noise. Their sum has a closed form: sum cos(k p) = sin((M + 1/2) p) / (2 sin(p / 2)) - 1/2."""
    f0 = F.interpolate(f0_hz[:, None], n, mode="linear", align_corners=True)[:, 0]
    start = torch.rand((f0.shape[0], 1), generator=generator, device=f0.device)
    turns = (f0.double() / SAMPLE_RATE_HZ).cumsum(1) + start
    phase = ((turns - turns.round()) * 2 * math.pi).float()
    harmonics = (7600 / f0).floor()
    half = (phase / 2).sin()
    near_zero = half.abs() < 1e-4
    total = ((harmonics + 0.5) * phase).sin() / (2 * torch.where(near_zero, 1.0, half)) - 0.5
    return torch.where(near_zero, harmonics, total) * (2 * f0 / (SAMPLE_RATE_HZ / 2)).sqrt()


def _resonances(hz: Tensor, formants: list[Tensor], tract: Tensor, generator: torch.Generator) -> Tensor:
    """Magnitude response [B, K, T] at hz [K, 1]: a cascade of two-pole resonators under a glottal slope."""
    one = tract.shape
    corner = _uniform(150, 500, one, generator)[..., None]
    slope = _uniform(0.15, 1.0, one, generator)[..., None]  # 1 is 6 dB an octave
    response: Tensor = (1 + (hz / corner) ** 2) ** (-slope / 2)
    centres = [*formants, *(fixed * tract for fixed in (3500, 4500, 5500, 6500))]
    for centre, bandwidth_hz in zip(centres, (80, 110, 170, 250, 350, 450, 550), strict=True):
        width = bandwidth_hz * _uniform(0.6, 2.0, one, generator)[..., None]
        square = centre[:, None] ** 2
        response = response * square / torch.hypot(hz**2 - square, width * hz)
    return response


def _octave(hz: Tensor) -> Tensor:
    """Pitch scale for spectra: 0 at 100 Hz, 1 at 8 kHz, level below 50 Hz."""
    return (hz / 100).clamp(min=0.5).log2() / math.log2(80)


def _timbre(hz: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random smooth amplitude responses [count, K] at hz [K]: cosines over the octaves, each within 8 dB."""
    gain_db = torch.zeros(count, hz.numel(), device=hz.device)
    for wave in range(1, 5):
        level = _uniform(-8, 8, (count, 1), generator) / wave
        gain_db += level * torch.cos(
            math.pi * wave * _octave(hz) + _uniform(0, math.pi, (count, 1), generator)
        )
    return 10 ** (gain_db / 20)


def augment(clean: Tensor, generator: torch.Generator) -> Tensor:
    """What a microphone would have made of clean speech [N, S]: same shape, another level.

    A clip each gets an equaliser (+-8 dB over the octaves and a random top cut), a reverberation (0.1-0.5 s),
    coloured noise at 8-45 dB under the speech, and a gain of +-12 dB; a quarter of the clips stay dry and
    noiseless. The mouth's truth is taken from `clean`; normalise the result as the session does its ring.
    """
    count, n = clean.shape
    device = clean.device
    one = (count, 1)
    tail = SAMPLE_RATE_HZ // 2
    padded = math.ceil((n + tail) / 4096) * 4096
    hz = torch.linspace(0, SAMPLE_RATE_HZ / 2, padded // 2 + 1, device=device)
    rough = _uniform(0, 1, one, generator) > 0.25
    cut_hz = 2 ** _uniform(math.log2(3200), math.log2(16000), one, generator)
    eq = _timbre(hz, count, generator) * (1 + (hz / cut_hz) ** 8).rsqrt()

    seconds = torch.arange(tail, device=device) / SAMPLE_RATE_HZ
    rt60 = _uniform(0.1, 0.5, one, generator)
    echo = torch.randn((count, tail), generator=generator, device=device) * 10 ** (-3 * seconds / rt60)
    wet = rough * 10 ** (_uniform(-26, -5, one, generator) / 20)
    echo = echo * wet / echo.norm(dim=1, keepdim=True)
    heard = torch.fft.rfft(clean, n=padded) * eq * (1 + torch.fft.rfft(echo, n=padded))
    heard = torch.fft.irfft(heard, n=padded)[:, :n]

    colour = 2 ** (_octave(hz) * _uniform(-7, 1, one, generator))  # from brownish to slightly blue
    noise = torch.fft.rfft(torch.randn((count, padded), generator=generator, device=device)) * colour
    noise = torch.fft.irfft(noise, n=padded)[:, :n]
    snr_db = _uniform(8, 45, one, generator)
    speech_rms = heard.square().mean(1, keepdim=True).sqrt()
    noise_rms = noise.square().mean(1, keepdim=True).sqrt()
    heard = heard + rough * noise * (speech_rms / noise_rms * 10 ** (-snr_db / 20))
    gained: Tensor = heard * 10 ** (_uniform(-12, 12, one, generator) / 20)
    return gained


_OPEN_BAND_HZ = (250.0, 4000.0)
_OPEN_DB = (-44.0, -16.0)  # mouth shut, mouth wide
_ROUND_BAND_HZ = (200.0, 2600.0)
_ROUND_CENTROID_HZ = (900.0, 1650.0)  # fully rounded, not at all
_COARTICULATION = (0.0215, 0.0945, 0.2296, 0.3087, 0.2296, 0.0945, 0.0215)  # Gaussian, 1.3 frames


def mouth_truth(samples: Tensor, sample_rate_hz: int, fps: int) -> Tensor:
    """What the mouth does: [..., F, 2] in [0, 1], (mouth_open, mouth_round) for every video frame.

    samples: [..., N] float, clean speech at -23 LUFS; F = N // (sample_rate_hz // fps). A fixed function of
    the sound: the power spectrum under an 80 ms Hann window on each frame's centre gives the level between
    250 and 4000 Hz, which opens the mouth linearly in decibels, and the amplitude-weighted centroid (in
    octaves) of 200-2600 Hz after 12 dB an octave of pre-emphasis, which follows F2 and a little F1 and so is
    low for rounded vowels (about 1.0 kHz for u and o, 1.2 for a, 2.0 for i), rounds it; rounding fades as the
    mouth shuts. Both are then spread over +-3 frames (coarticulation). The ends repeat; silence is all zeros.
    """
    n = sample_rate_hz // fps
    frames = samples.shape[-1] // n
    width = 2 * n  # 80 ms at 25 frames a second
    lead = (width - n) // 2
    padded = F.pad(samples[..., : frames * n].float(), (lead, width - n - lead))
    window = torch.hann_window(width, device=samples.device)
    power = torch.fft.rfft(padded.unfold(-1, width, n) * window).abs().square() / window.square().sum()
    hz = torch.linspace(0, sample_rate_hz / 2, width // 2 + 1, device=samples.device)

    def band(low_hz: float, high_hz: float) -> Tensor:
        return ((hz >= low_hz) & (hz <= high_hz)).float()

    level_db = 10 * torch.log10(power @ band(*_OPEN_BAND_HZ) * 2 / width + 1e-12)
    shut, wide = _OPEN_DB
    opening = ((level_db - shut) / (wide - shut)).clamp(0, 1)

    weight = power.sqrt() * hz.square() * band(*_ROUND_BAND_HZ)
    octaves = hz.clamp(min=1).log2()
    centroid = (weight @ octaves + 1e-9 * math.log2(_ROUND_BAND_HZ[1])) / (weight.sum(-1) + 1e-9)
    low, high = (math.log2(edge) for edge in _ROUND_CENTROID_HZ)
    rounding = ((high - centroid) / (high - low)).clamp(0, 1) * (opening / 0.35).clamp(0, 1)

    mouth = torch.stack([opening, rounding], -2)
    kernel = torch.tensor(_COARTICULATION, device=samples.device)[None, None]
    flat = F.pad(mouth.reshape(-1, 1, frames), (3, 3), mode="replicate")
    spread: Tensor = F.conv1d(flat, kernel / kernel.sum())
    return spread.view_as(mouth).mT

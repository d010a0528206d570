"""Clips of the talking-face world: what a model sees of them, and their truth."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import StreamConfig
from ...modules.audio import normalize_loudness
from ...modules.precision import autocast
from ...modules.toy_encoders import MelAudioEncoder, PatchImageEncoder
from ...modules.vae import VAE
from .face import MOTION_NAMES, render, sample_identities
from .motion import sample_motion
from .speech import augment, mouth_truth, sample_speech

MOUTH = slice(MOTION_NAMES.index("mouth_open"), MOTION_NAMES.index("mouth_round") + 1)
TAIL_FRAMES = 8  # sound after a chunk's end that its truth depends on and its model never hears
WINDOW_MARGIN = 2  # audio frames before a chunk's first that its windows reach


def talk(identity: Tensor, mouth: Tensor, generator: torch.Generator, height: int, width: int) -> Tensor:
    """Render clips: identity [N, 12], mouth truth [N, T, 2] -> video [N, 3, T, H, W] in [-1, 1]."""
    motion = sample_motion(len(identity), mouth.shape[1], generator, identity.device)
    motion[..., MOUTH] = mouth
    return render(identity, motion, height, width).transpose(1, 2)


class SpeechBank:
    """Long synthetic recordings, made once, from which training cuts its clips.

    Synthesis costs more than everything else in a batch; a cut at a random place of one of many
    hours of speakers does not repeat within a training run.
    """

    def __init__(self, speakers: int, seconds: float, generator: torch.Generator) -> None:
        parts = [
            sample_speech(min(16, speakers - start), seconds, generator, generator.device)
            for start in range(0, speakers, 16)
        ]
        self._clean = torch.cat(parts)

    def cut(self, count: int, samples: int, generator: torch.Generator) -> Tensor:
        """`count` random cuts [count, samples]."""
        device = generator.device
        speaker = torch.randint(len(self._clean), (count, 1), generator=generator, device=device)
        last = self._clean.shape[1] - samples
        start = torch.randint(last, (count, 1), generator=generator, device=device)
        return self._clean[speaker, start + torch.arange(samples, device=device)]


def first_sound(kind: str, count: int, stream: StreamConfig, generator: torch.Generator) -> Tensor:
    """At which sample of the ring the stream began: [count, 1].

    "first": a stream's first chunk, whose ring holds one chunk of sound; "later": two chunks or
    more, half of the time a full ring.  One clip in 30 is silent to its end.
    """
    device = generator.device
    ring = round(stream.ring_s * stream.sample_rate_hz)
    draw = torch.rand(count, 1, generator=generator, device=device)
    if kind == "first":
        start = torch.full_like(draw, ring - stream.chunk_samples)
    else:
        start = ((2 * draw - 1).clamp(min=0) * (ring - 2 * stream.chunk_samples)).round()
    silent = torch.rand(count, 1, generator=generator, device=device) < 1 / 30
    return torch.where(silent, 10 * ring, start)


@dataclasses.dataclass(frozen=True)
class Sound:
    """A chunk's sound as the model hears it and as the mouth follows it."""

    features: Tensor  # [N, frames + margin, blocks, dim]
    mouth: Tensor  # [N, frames, 2]


def sample_sound(
    bank: SpeechBank, kind: str, count: int, stream: StreamConfig, generator: torch.Generator
) -> Sound:
    """Random chunks; `kind` as in `first_sound`."""
    ring = round(stream.ring_s * stream.sample_rate_hz)
    tail = TAIL_FRAMES * stream.samples_per_frame
    clean = bank.cut(count, ring + tail, generator)
    heard = augment(clean, generator)
    sounding = torch.arange(ring + tail, device=clean.device) >= first_sound(kind, count, stream, generator)
    clean, heard = clean * sounding, heard * sounding
    ring_frames = ring // stream.samples_per_frame
    # The truth's loudness is the ring's, as the model's is; what comes after only bends the mouth.
    loud = normalize_loudness(clean[:, :ring], stream.sample_rate_hz, stream.loudness_lufs)
    rms = clean[:, :ring].square().mean(1, keepdim=True).sqrt()
    gain = loud.square().mean(1, keepdim=True).sqrt() / rms.clamp(min=1e-9)
    mouth = mouth_truth(clean * gain, stream.sample_rate_hz, stream.fps)
    heard = normalize_loudness(heard[:, :ring], stream.sample_rate_hz, stream.loudness_lufs)
    features = MelAudioEncoder(stream.sample_rate_hz, stream.fps)(heard, ring_frames)
    return Sound(
        features[:, -(stream.frames + WINDOW_MARGIN) :],
        mouth[:, ring_frames - stream.frames : ring_frames],
    )


@dataclasses.dataclass
class Clips:
    """Encoded training clips, one shape, on one device; latents normalised."""

    target: Tensor  # [N, z, T, h, w]
    reference: Tensor  # [N, z, T, h, w]: the reference image and mid-grey frames
    motion: Tensor  # [N, z, m, h, w]: what the model is given of the past
    image: Tensor  # [N, tokens, dim]
    features: Tensor  # [N, frames + margin, blocks, dim]

    def __len__(self) -> int:
        return len(self.target)

    def batch(self, count: int, generator: torch.Generator) -> Clips:
        """A random batch, float32."""
        rows = torch.randint(len(self), (count,), generator=generator, device=self.target.device)
        return Clips(*(getattr(self, f.name)[rows].float() for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class ClipKind:
    """What a set of clips teaches.

    chunk: "first" (the motion latent is the reference image itself) or "later" (the last frames of
    the past); outside: the reference is drawn from outside the clip, else it is the clip's first
    frame; reencoded: the past went through the VAE once, as it does in a stream.
    """

    chunk: str
    outside: bool
    reencoded: bool
    height: int
    width: int


@torch.no_grad()
def make_clips(
    vae: VAE, bank: SpeechBank, kind: ClipKind, count: int, stream: StreamConfig, generator: torch.Generator
) -> Clips:
    """Render and encode `count` new clips, 64 at a time, kept in bfloat16."""
    encode_image = PatchImageEncoder()
    parts: list[Clips] = []
    step = stream.frames - 1
    for start in range(0, count, 64):
        size = min(64, count - start)
        sound = sample_sound(bank, kind.chunk, size, stream, generator)
        identity = sample_identities(size, generator).to(generator.device)
        mouth = sound.mouth
        if kind.chunk == "first":
            # A portrait's mouth knows nothing of the sound.
            mouth = torch.cat((torch.rand_like(mouth[:, :1]) ** 2, mouth[:, 1:]), dim=1)
        video = talk(identity, mouth, generator, kind.height, kind.width)
        image = video[:, :, :1]
        if kind.outside and kind.chunk != "first":
            other = torch.rand(size, 1, 2, generator=generator, device=identity.device) ** 2
            image = talk(identity, other, generator, kind.height, kind.width)
        with autocast(video.device):
            target = vae.normalize(vae.encode_distribution(video, step)[0])
            grey = F.pad(image, (0, 0, 0, 0, 0, stream.frames - 1))
            reference = vae.normalize(vae.encode_distribution(grey, step)[0])
            if kind.chunk == "first":
                motion = reference[:, :, :1]
            elif kind.reencoded:
                past = vae.decode(target[:, :, :2]).clamp(-1, 1)
                motion = vae.normalize(vae.encode_distribution(past)[0])
            else:
                motion = target[:, :, :2]
        parts.append(
            Clips(*(x.bfloat16() for x in (target, reference, motion, encode_image(image), sound.features)))
        )
    return Clips(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Clips)))

"""The DiT against diffusers' WanTransformer3DModel, and the audio branch, which diffusers lacks."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.config import DiTConfig
from flashtalk_rt.modules.dit import DiT

# diffusers splits text from image tokens at 512, so text_len must be the published one here.
CONFIG = DiTConfig(
    dim=48,
    ffn_dim=80,
    num_heads=3,
    num_layers=2,
    freq_dim=32,
    text_dim=20,
    text_len=512,
    image_dim=24,
    audio_blocks=2,
    audio_dim=6,
    intermediate_dim=10,
    output_dim=12,
    context_tokens=4,
)
BOUND = 1e-4

# Our (the published) name -> diffusers' name.  What is left out is the audio branch.
NAMES = {
    r"patch_embedding": "patch_embedding",
    r"text_embedding\.0": "condition_embedder.text_embedder.linear_1",
    r"text_embedding\.2": "condition_embedder.text_embedder.linear_2",
    r"time_embedding\.0": "condition_embedder.time_embedder.linear_1",
    r"time_embedding\.2": "condition_embedder.time_embedder.linear_2",
    r"time_projection\.1": "condition_embedder.time_proj",
    r"img_emb\.proj\.0": "condition_embedder.image_embedder.norm1",
    r"img_emb\.proj\.1": "condition_embedder.image_embedder.ff.net.0.proj",
    r"img_emb\.proj\.3": "condition_embedder.image_embedder.ff.net.2",
    r"img_emb\.proj\.4": "condition_embedder.image_embedder.norm2",
    r"head\.head": "proj_out",
    r"blocks\.(\d+)\.norm3": r"blocks.\1.norm2",
    r"blocks\.(\d+)\.ffn\.0": r"blocks.\1.ffn.net.0.proj",
    r"blocks\.(\d+)\.ffn\.2": r"blocks.\1.ffn.net.2",
    r"blocks\.(\d+)\.self_attn\.([qkv])": r"blocks.\1.attn1.to_\2",
    r"blocks\.(\d+)\.self_attn\.o": r"blocks.\1.attn1.to_out.0",
    r"blocks\.(\d+)\.self_attn\.norm_([qk])": r"blocks.\1.attn1.norm_\2",
    r"blocks\.(\d+)\.cross_attn\.([qkv])": r"blocks.\1.attn2.to_\2",
    r"blocks\.(\d+)\.cross_attn\.o": r"blocks.\1.attn2.to_out.0",
    r"blocks\.(\d+)\.cross_attn\.norm_([qk])": r"blocks.\1.attn2.norm_\2",
    r"blocks\.(\d+)\.cross_attn\.([kv])_img": r"blocks.\1.attn2.add_\2_proj",
    r"blocks\.(\d+)\.cross_attn\.norm_k_img": r"blocks.\1.attn2.norm_added_k",
}
WHOLE_NAMES = {
    r"head\.modulation": "scale_shift_table",
    r"blocks\.(\d+)\.modulation": r"blocks.\1.scale_shift_table",
}
AUDIO = re.compile(r"audio_proj\.|blocks\.\d+\.(audio_cross_attn|norm_x)\.")


def diffusers_name(name: str) -> str:
    for pattern, target in WHOLE_NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(target)
    layer, kind = name.rsplit(".", 1)
    for pattern, target in NAMES.items():
        if match := re.fullmatch(pattern, layer):
            return f"{match.expand(target)}.{kind}"
    raise KeyError(name)


def random_dit(config: DiTConfig, seed: int = 0) -> DiT:
    """Every parameter random, the norms and biases included, so that none can be left out unseen."""
    torch.manual_seed(seed)
    dit = DiT(config).eval().requires_grad_(False)
    for name, parameter in dit.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() in (2, 5) else 0.3
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(offset + scale * torch.randn_like(parameter))
    return dit


def silence_audio(dit: DiT) -> None:
    for block in dit._blocks():
        block.audio_cross_attn.proj.weight.zero_()
        block.audio_cross_attn.proj.bias.zero_()


def oracle(dit: DiT) -> WanTransformer3DModel:
    config = dit.config
    other = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim,
    )
    state = {diffusers_name(k): v for k, v in dit.state_dict().items() if not AUDIO.match(k)}
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return other.eval()


@dataclasses.dataclass
class Inputs:
    latent: Tensor
    y: Tensor
    t: Tensor
    text: Tensor
    image: Tensor
    audio: Tensor


def inputs(
    config: DiTConfig, batch: int, size: tuple[int, int, int], text: int = 7, tokens: int = 5
) -> Inputs:
    """size: latent frames, height, width."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g)

    frames = 1 + 4 * (size[0] - 1)
    return Inputs(
        latent=normal(16, *size),
        y=normal(20, *size),
        t=torch.linspace(937.5, 214.28, batch),
        text=normal(text, config.text_dim),
        image=normal(tokens, config.image_dim),
        audio=normal(frames, config.audio_window, config.audio_blocks, config.audio_dim),
    )


@torch.no_grad()
def velocity(dit: DiT, x: Inputs, chunk_frames: int | None = None) -> Tensor:
    context = dit.context(x.text, x.image)
    return dit(x.latent, x.t, x.y, context, dit.audio_context(x.audio), chunk_frames)


def relative(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("size", "batch"),
    [((3, 8, 6), 1), ((3, 6, 8), 1), ((1, 2, 2), 1), ((5, 10, 14), 1), ((2, 6, 2), 3), ((9, 12, 6), 2)],
    ids=str,
)
def test_velocity_matches_diffusers(size: tuple[int, int, int], batch: int) -> None:
    dit = random_dit(CONFIG)
    silence_audio(dit)
    x = inputs(CONFIG, batch, size)
    text = torch.nn.functional.pad(x.text, (0, 0, 0, CONFIG.text_len - x.text.shape[1]))
    with torch.no_grad():
        expected = oracle(dit)(torch.cat((x.latent, x.y), 1), x.t, text, x.image, return_dict=False)[0]
    assert relative(velocity(dit, x), expected) < BOUND


@pytest.mark.parametrize(("heads", "dim"), [(2, 16), (1, 20), (2, 64), (1, 128)], ids=str)
def test_velocity_matches_diffusers_at_every_head_width(heads: int, dim: int) -> None:
    # The pairs of a head do not split evenly over time, height and width: time takes the rest.
    config = dataclasses.replace(CONFIG, num_heads=heads, dim=dim, num_layers=1)
    dit = random_dit(config, seed=2)
    silence_audio(dit)
    x = inputs(config, 1, (4, 6, 10), text=512, tokens=257)
    with torch.no_grad():
        expected = oracle(dit)(torch.cat((x.latent, x.y), 1), x.t, x.text, x.image, return_dict=False)[0]
    assert relative(velocity(dit, x), expected) < BOUND


def test_every_parameter_outside_the_audio_branch_is_compared() -> None:
    ours = [name for name in DiT(CONFIG).state_dict() if not AUDIO.match(name)]
    assert len({diffusers_name(name) for name in ours}) == len(ours)


def test_audio_changes_the_velocity() -> None:
    dit = random_dit(CONFIG)
    x = inputs(CONFIG, 1, (3, 4, 4))
    heard = velocity(dit, x)
    assert relative(velocity(dit, dataclasses.replace(x, audio=x.audio.flip(1))), heard) > 1e-3
    silence_audio(dit)
    assert relative(velocity(dit, x), heard) > 1e-3


def test_audio_cross_attention_is_one_softmax_a_latent_frame() -> None:
    batch, frames, tokens, keys, heads, dim = 2, 3, 5, 4, 2, 6
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, frames * tokens, heads, dim, generator=g)
    k, v = (torch.randn(batch, frames, keys, heads, dim, generator=g) for _ in range(2))
    out = ops.audio_cross_attention(q, k, v)
    for b in range(batch):
        for frame in range(frames):
            span = slice(frame * tokens, (frame + 1) * tokens)
            for head in range(heads):
                scores = q[b, span, head].double() @ k[b, frame, :, head].double().T / dim**0.5
                expected = scores.softmax(-1) @ v[b, frame, :, head].double()
                torch.testing.assert_close(out[b, span, head].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frame", range(3))
def test_a_latent_frames_audio_reaches_only_its_own_tokens(frame: int) -> None:
    dit = random_dit(dataclasses.replace(CONFIG, num_layers=1))
    layer = dit._blocks()[0].audio_cross_attn
    tokens = torch.randn(1, 3, CONFIG.context_tokens, CONFIG.output_dim)
    other = tokens.clone()
    other[:, frame] += 1
    x = torch.randn(1, 3 * 4, CONFIG.dim)
    with torch.no_grad():
        changed = (layer(x, layer.context(other)) - layer(x, layer.context(tokens))).abs().amax(-1)
    changed = changed.view(3, 4).amax(1) > 1e-6
    assert changed.tolist() == [i == frame for i in range(3)]


@pytest.mark.parametrize("video_frame", range(9))
def test_a_video_frames_window_reaches_only_its_latent_frame(video_frame: int) -> None:
    dit = random_dit(CONFIG)
    audio = inputs(CONFIG, 1, (3, 2, 2)).audio
    other = audio.clone()
    other[:, video_frame] += 1
    with torch.no_grad():
        changed = (dit.audio_proj(other) - dit.audio_proj(audio)).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [i == (video_frame + 3) // 4 for i in range(3)]


def test_grouped_windows_take_each_neighbour_once() -> None:
    """Left half of a group's first frame, centres of the middle two, right half of the last."""
    dit = random_dit(CONFIG)
    audio = inputs(CONFIG, 1, (2, 2, 2)).audio
    used = torch.zeros(audio.shape[1:3], dtype=torch.bool)
    with torch.no_grad():
        base = dit.audio_proj(audio)
        for frame in range(audio.shape[1]):
            for neighbour in range(audio.shape[2]):
                other = audio.clone()
                other[:, frame, neighbour] += 1
                used[frame, neighbour] = bool((dit.audio_proj(other) - base).abs().max() > 1e-6)
    assert used.int().tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 1],
    ]


def test_chunks_are_causal_and_the_first_is_as_if_alone() -> None:
    dit = random_dit(CONFIG)
    x = inputs(CONFIG, 1, (5, 4, 4))
    chunked = velocity(dit, x, chunk_frames=2)
    first = dataclasses.replace(x, latent=x.latent[:, :, :2], y=x.y[:, :, :2], audio=x.audio[:, :5])
    assert relative(chunked[:, :, :2], velocity(dit, first)) < 1e-5
    later = dataclasses.replace(x, latent=torch.cat((x.latent[:, :, :4], x.latent[:, :, 4:] + 1), 2))
    changed = (velocity(dit, later, chunk_frames=2) - chunked).abs().amax((0, 1, 3, 4)) > 1e-6
    assert changed.tolist() == [False] * 4 + [True]
    # One chunk that holds everything is full attention.
    torch.testing.assert_close(velocity(dit, x, chunk_frames=5), velocity(dit, x), rtol=0, atol=0)
    assert relative(chunked, velocity(dit, x)) > 1e-4

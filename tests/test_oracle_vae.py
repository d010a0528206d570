"""The VAE against diffusers' AutoencoderKLWan, and what its explicit caches promise."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from flashtalk_rt.config import VAEConfig
from flashtalk_rt.modules.vae import VAE, Cache, CacheCursor
from flashtalk_rt.modules.vae_layers import Downsample

BOUND = 1e-4
NDHWC = torch.channels_last_3d
SMALL = VAEConfig(dim=8, num_res_blocks=1)

# Inside a residual block: our (the published) name -> diffusers' name.
BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def diffusers_name(name: str, config: VAEConfig) -> str:
    for ours, theirs in (("conv1.", "quant_conv."), ("conv2.", "post_quant_conv.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    side, rest = name.split(".", 1)
    rest = re.sub(r"(residual\.\d|shortcut)(?=\.)", lambda m: BLOCK[m[1]], rest)
    if match := re.match(r"upsamples\.(\d+)\.(.*)", rest):
        level, layer = divmod(int(match[1]), config.num_res_blocks + 2)
        place = f"resnets.{layer}" if layer <= config.num_res_blocks else "upsamplers.0"
        return f"{side}.up_blocks.{level}.{place}.{match[2]}"
    for pattern, target in (
        (r"conv1\.", "conv_in."),
        (r"downsamples\.", "down_blocks."),
        (r"middle\.0\.", "mid_block.resnets.0."),
        (r"middle\.1\.", "mid_block.attentions.0."),
        (r"middle\.2\.", "mid_block.resnets.1."),
        (r"head\.0\.", "norm_out."),
        (r"head\.2\.", "conv_out."),
    ):
        if match := re.match(pattern, rest):
            return f"{side}.{target}{rest[match.end() :]}"
    raise KeyError(name)


def random_vae(config: VAEConfig = SMALL, seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    vae = VAE(config).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def oracle(vae: VAE) -> AutoencoderKLWan:
    config = vae.config
    other = AutoencoderKLWan(
        base_dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
    )
    other.load_state_dict({diffusers_name(k, config): v for k, v in vae.state_dict().items()})
    return other.eval()


def video(frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(3)).tanh()


def latent(frames: int, height: int, width: int, batch: int = 1, channels: int = 16) -> Tensor:
    shape = (batch, channels, frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def relative(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def statistics(other: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x) for x in (other.config.latents_mean, other.config.latents_std))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


CONFIGS = {
    "dim 8, 1 block": SMALL,
    "dim 16, 2 blocks": VAEConfig(dim=16, num_res_blocks=2),
    "own statistics": VAEConfig(
        dim=8, num_res_blocks=2, z_dim=4, latent_mean=(0.1, -0.2, 0.3, 0.4), latent_std=(0.5, 1.5, 2.0, 1.0)
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("frames", "height", "width", "batch"), [(1, 16, 24, 1), (5, 24, 16, 2), (9, 8, 32, 1), (13, 16, 16, 1)]
)
@torch.no_grad()
def test_encode_matches_diffusers(
    config: VAEConfig, frames: int, height: int, width: int, batch: int
) -> None:
    vae, x = random_vae(config), video(frames, height, width, batch)
    other = oracle(vae)
    theirs = other.encode(x).latent_dist
    mean, logvar = vae.encode_distribution(x)
    assert relative(mean, theirs.mean) < BOUND
    assert relative(logvar, theirs.logvar) < BOUND
    center, std = statistics(other)
    assert relative(vae.encode(x), (theirs.mean - center) / std) < BOUND


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("frames", "height", "width", "batch"), [(1, 2, 3, 1), (2, 3, 2, 2), (3, 1, 4, 1), (4, 2, 2, 1)]
)
@torch.no_grad()
def test_decode_matches_diffusers(
    config: VAEConfig, frames: int, height: int, width: int, batch: int
) -> None:
    vae, z = random_vae(config), latent(frames, height, width, batch, config.z_dim)
    # diffusers clamps to [-1, 1]: scale the last layer so that nothing is clamped.
    last = vae.decoder.head[2]
    gain = 0.9 / vae.decode(z).abs().max()
    last.weight.mul_(gain)
    last.bias.mul_(gain)
    other = oracle(vae)
    center, std = statistics(other)
    theirs = other.decode(z * std + center).sample
    assert 0.8 < theirs.abs().max() < 0.95
    assert relative(vae.decode(z), theirs) < BOUND


@pytest.mark.parametrize("step", [1, 2, 3, 4, 100])
@torch.no_grad()
def test_decoding_in_steps_is_decoding_one_latent_frame_at_a_time(step: int) -> None:
    vae, z = random_vae().double(), latent(6, 2, 3)
    cache, parts = None, []
    for frame in z.split(1, dim=2):
        frames, cache = vae.decode_step(frame, cache)
        parts.append(frames)
    assert [p.shape[2] for p in parts] == [1, 4, 4, 4, 4, 4]
    assert relative(vae.decode(z, step), torch.cat(parts, 2)) < 1e-12


@pytest.mark.parametrize("step", [8, 12, 16, 32])
@torch.no_grad()
def test_the_encoding_step_does_not_change_the_result(step: int) -> None:
    vae, x = random_vae().double(), video(17, 16, 24)
    for out, expected in zip(vae.encode_distribution(x, step), vae.encode_distribution(x, 4), strict=True):
        assert relative(out, expected) < 1e-12


def encoded(vae: VAE, x: Tensor, split: list[int]) -> tuple[Tensor, list[Cache]]:
    """The moments, one call of the encoder for each part of `split`, and the cache that each call leaves."""
    cache: Cache | None = None
    parts, caches = [], []
    for frames in x.split(split, dim=2):
        cursor = CacheCursor(cache)
        parts.append(vae.encoder(frames, cursor))
        cache = cursor.future
        caches.append(cache)
    return torch.cat(parts, dim=2), caches


@pytest.mark.parametrize(
    ("ones", "jointly"), [([1, 4], [5]), ([1, 4, 4], [5, 4]), ([1, 4, 4], [9]), ([1, 4, 4, 4], [9, 4])]
)
@torch.no_grad()
def test_a_videos_start_may_be_encoded_at_once(ones: list[int], jointly: list[int]) -> None:
    """Moments and caches are those of the first frame alone and then four at a time."""
    vae, x = random_vae().double(), video(sum(ones), 16, 24, batch=2).double()
    expected, caches = encoded(vae, x, ones)
    found, joint_caches = encoded(vae, x, jointly)
    assert relative(found, expected) < 1e-12
    ends = list(itertools.accumulate(ones))
    for end, remembered in zip(itertools.accumulate(jointly), joint_caches, strict=True):
        for mine, one in zip(remembered, caches[ends.index(end)], strict=True):
            assert mine is not None and one is not None
            assert relative(mine, one) < 1e-12


@pytest.mark.parametrize(
    ("frames", "step", "calls"),
    [(1, 4, [1]), (5, 4, [5]), (5, 32, [5]), (9, 4, [5, 4]), (17, 8, [9, 8]), (13, 8, [9, 4])],
)
@torch.no_grad()
def test_the_first_frame_takes_no_call_of_its_own(frames: int, step: int, calls: list[int]) -> None:
    vae = random_vae().channels_last()
    found: list[int] = []
    layouts: list[bool] = []
    vae.encoder.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[2]))
    for layer in vae.encoder.downsamples:
        if isinstance(layer, Downsample):  # else the next convolution would copy it
            layer.register_forward_hook(lambda _, __, y: layouts.append(y.is_contiguous(memory_format=NDHWC)))
    vae.encode_distribution(video(frames, 16, 24), step)
    assert found == calls and layouts == [True] * (3 * len(calls))


@pytest.mark.parametrize("kept", [1, 5, 9])
@torch.no_grad()
def test_later_frames_change_no_earlier_latent(kept: int) -> None:
    vae, x = random_vae(), video(13, 16, 16)
    other = torch.cat((x[:, :, :kept], -x[:, :, kept:]), dim=2)
    changed = (vae.encode(other) - vae.encode(x)).abs().amax((0, 1, 3, 4))
    earlier = (kept - 1) // 4 + 1
    assert changed[:earlier].tolist() == [0] * earlier
    assert bool((changed[earlier:] > 1e-4).all())


@pytest.mark.parametrize("kept", [1, 2, 3])
@torch.no_grad()
def test_later_latents_change_no_earlier_frame(kept: int) -> None:
    vae, z = random_vae(), latent(4, 2, 2)
    other = torch.cat((z[:, :, :kept], -z[:, :, kept:]), dim=2)
    changed = (vae.decode(other) - vae.decode(z)).abs().amax((0, 1, 3, 4))
    earlier = 1 + 4 * (kept - 1)
    assert changed[:earlier].tolist() == [0] * earlier
    assert bool((changed[earlier:] > 1e-4).all())


@torch.no_grad()
def test_channels_last_weights_give_the_same_results() -> None:
    vae, x, z = random_vae(), video(9, 16, 24), latent(3, 2, 3)
    encoded, decoded = vae.encode(x), vae.decode(z)
    assert vae.channels_last() is vae
    assert vae.encoder.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert relative(vae.encode(x), encoded) < 1e-5
    assert relative(vae.decode(z), decoded) < 1e-5


def test_gradients_reach_every_parameter_and_are_right() -> None:
    vae = random_vae().double().requires_grad_(True)
    x = video(9, 16, 16).double().requires_grad_(True)

    def loss_of(x: Tensor) -> Tensor:
        mean, logvar = vae.encode_distribution(x)
        return vae.decode(vae.normalize(mean)).square().mean() + logvar.square().mean()

    loss_of(x).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # Along its own direction the gradient is the slope.  `normalize` and `decode` compute in float32,
    # which bounds how well a difference can tell.
    assert x.grad is not None
    direction, h = x.grad / x.grad.norm(), 1e-2
    with torch.no_grad():
        slope = (loss_of(x + h * direction) - loss_of(x - h * direction)) / (2 * h)
    assert x.grad.norm().item() == pytest.approx(slope.item(), rel=1e-3)


def test_sizes_that_do_not_divide_are_named() -> None:
    vae = random_vae()
    with pytest.raises(ValueError, match="4 frames of 16 x 16"):
        vae.encode(video(4, 16, 16))
    with pytest.raises(ValueError, match="5 frames of 16 x 20"):
        vae.encode(video(5, 16, 20))
    with pytest.raises(ValueError, match="first decode step takes one latent frame, not 2"):
        vae.decode_step(latent(2, 2, 2), None)

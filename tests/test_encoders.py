"""The encoders against transformers' own forward passes, on tiny random networks with published names."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_published as tiny
import torch
import torch.nn.functional as F
import transformers
from published_encoders import clip_from_published, umt5_from_published, wav2vec2_from_published
from torch import Tensor

from flashtalk_rt.errors import CheckpointError, InputError
from flashtalk_rt.modules.encoders import (
    CLIP_MEAN,
    CLIP_STD,
    Umt5TextEncoder,
    Wav2Vec2AudioEncoder,
    clean_prompt,
    clip_config,
    folder_tokenizer,
    umt5_config,
)

CLIP: dict[str, Any] = {"image_size": 28, "patch_size": 14, "dim": 80, "heads": 2, "layers": 3}
UMT5: dict[str, Any] = {
    "vocab": len(tiny.WORDS),
    "dim": 32,
    "dim_attn": 24,
    "dim_ffn": 40,
    "heads": 2,
    "layers": 2,
    "num_buckets": 8,
}


def close(out: Tensor, expected: Tensor) -> bool:
    return out.shape == expected.shape and bool((out - expected).norm() < 1e-5 * expected.norm())


# --- wav2vec2


def stock_wav2vec2(encoder: Wav2Vec2AudioEncoder, samples: Tensor) -> Tensor:
    x = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
    with torch.no_grad():
        out = encoder.model(x[None], output_hidden_states=True)
    # The last state as transformers 4 gave it, which the published code ran: after the encoder's last norm,
    # where there is one. (transformers 5 lists it before that norm.)
    return torch.stack([state[0] for state in (*out.hidden_states[1:-1], out.last_hidden_state)], dim=1)


@pytest.mark.parametrize("stable", [False, True])
def test_wav2vec2_is_the_stock_network_where_interpolation_is_the_identity(stable: bool) -> None:
    torch.manual_seed(0)
    norm = "layer" if stable else "group"
    values = {**tiny.AUDIO.to_dict(), "do_stable_layer_norm": stable, "feat_extract_norm": norm}
    config = transformers.Wav2Vec2Config(**values)
    encoder = wav2vec2_from_published(tiny.wav2vec2_state(config), config)
    samples = 0.1 * torch.randn(400 + 320 * 9)  # ten convolution features exactly
    expected = stock_wav2vec2(encoder, samples)
    assert expected.shape == (10, 2, 32)
    assert close(encoder(samples, 10), expected)


def test_wav2vec2_interpolates_to_the_frames_and_ignores_scale() -> None:
    torch.manual_seed(0)
    encoder = wav2vec2_from_published(tiny.wav2vec2_state(), tiny.AUDIO)
    samples = 0.1 * torch.randn(16_000)
    out = encoder(samples, 25)
    assert out.shape == (25, 2, 32) and not out.requires_grad
    assert (encoder(7 * samples + 0.3, 25) - out).norm() < 1e-3 * out.norm()
    assert not close(encoder(samples.flip(0), 25), out)
    # Written out once more: 49 features, endpoints kept, linear between.
    network = encoder.model
    x = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
    with torch.no_grad():
        features = network.feature_extractor(x[None])[0]
        at = torch.linspace(0, features.shape[1] - 1, 25)
        low = at.floor().long().clamp(max=features.shape[1] - 2)
        mixed = torch.lerp(features[:, low], features[:, low + 1], at - low)
        hidden = network.feature_projection(mixed.T[None])[0]
        states = network.encoder(hidden).last_hidden_state[0]
    assert close(out[:, -1], states)


def test_wav2vec2_accepts_silence_and_refuses_too_little_sound() -> None:
    encoder = Wav2Vec2AudioEncoder(tiny.AUDIO)
    assert encoder(torch.zeros(400), 1).isfinite().all()
    with pytest.raises(InputError, match=r"N >= 400.*\[399\]"):
        encoder(torch.zeros(399), 1)
    with pytest.raises(InputError, match="frames 0"):
        encoder(torch.zeros(400), 0)


def test_wav2vec2_has_neither_dropout_nor_masking() -> None:
    encoder = Wav2Vec2AudioEncoder(tiny.AUDIO)
    assert not encoder.training and not hasattr(encoder.model, "masked_spec_embed")
    samples = torch.randn(4000)
    assert torch.equal(encoder(samples, 5), encoder(samples, 5))


# --- CLIP


def stock_clip(state: dict[str, Tensor], settings: dict[str, Any]) -> transformers.CLIPVisionModel:
    """The whole tower, last block and all, its weights placed by hand."""
    network = transformers.CLIPVisionModel(clip_config(settings))
    network.eval()
    dim = settings["dim"]
    ours = {
        "embeddings.class_embedding": state["visual.cls_embedding"].flatten(),
        "embeddings.position_embedding.weight": state["visual.pos_embedding"][0],
        "embeddings.patch_embedding.weight": state["visual.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"pre_layrnorm.{kind}"] = state[f"visual.pre_norm.{kind}"]
        ours[f"post_layernorm.{kind}"] = state[f"visual.post_norm.{kind}"]
        for i in range(settings["layers"]):
            theirs, block = f"visual.transformer.{i}.", f"encoder.layers.{i}."
            for j, letter in enumerate("qkv"):
                rows = state[f"{theirs}attn.to_qkv.{kind}"][j * dim : (j + 1) * dim]
                ours[f"{block}self_attn.{letter}_proj.{kind}"] = rows
            ours[f"{block}self_attn.out_proj.{kind}"] = state[f"{theirs}attn.proj.{kind}"]
            ours[f"{block}layer_norm1.{kind}"] = state[f"{theirs}norm1.{kind}"]
            ours[f"{block}layer_norm2.{kind}"] = state[f"{theirs}norm2.{kind}"]
            ours[f"{block}mlp.fc1.{kind}"] = state[f"{theirs}mlp.0.{kind}"]
            ours[f"{block}mlp.fc2.{kind}"] = state[f"{theirs}mlp.2.{kind}"]
    network.load_state_dict(ours)
    return network


@pytest.mark.parametrize(("activation", "side"), [("gelu", 28), ("quick_gelu", 28), ("gelu", 39)])
def test_clip_is_the_stock_hidden_state_before_the_last_block(activation: str, side: int) -> None:
    """39 pixels hold two patches of 14 and are scaled to all the same."""
    torch.manual_seed(0)
    state = tiny.random_state(tiny.clip_shapes())
    settings = {**CLIP, "activation": activation, "image_size": side}
    encoder = clip_from_published(state, settings)
    image = torch.rand(1, 3, 1, 50, 34) * 2 - 1
    pixels = F.interpolate(image[:, :, 0], (side, side), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        states = stock_clip(state, settings)(
            ((pixels + 1) / 2 - mean) / std, output_hidden_states=True
        ).hidden_states
    out = encoder(image)
    assert out.shape == (1, 5, 80) and not out.requires_grad
    assert close(out, states[-2]) and not close(out, states[-1])


def test_clip_statistics_are_transformers_own() -> None:
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert list(CLIP_MEAN) == OPENAI_CLIP_MEAN and list(CLIP_STD) == OPENAI_CLIP_STD


def test_clip_does_not_hold_its_last_block() -> None:
    state = tiny.random_state(tiny.clip_shapes())
    for name in list(state):
        if name.startswith(("visual.transformer.2.", "visual.post_norm", "visual.head", "textual")):
            state[name] = torch.full_like(state[name], float("nan"))
    assert clip_from_published(state, CLIP)(torch.zeros(1, 3, 1, 28, 28)).isfinite().all()


def test_clip_refuses_an_unknown_activation() -> None:
    with pytest.raises(CheckpointError, match='"swi_glu"'):
        clip_config({**CLIP, "activation": "swi_glu"})


# --- umT5


def stock_umt5(state: dict[str, Tensor]) -> transformers.UMT5EncoderModel:
    network = transformers.UMT5EncoderModel(umt5_config(UMT5))
    network.eval()
    table = {"attn.q": "0.SelfAttention.q", "attn.k": "0.SelfAttention.k", "attn.v": "0.SelfAttention.v"}
    table |= {"attn.o": "0.SelfAttention.o", "norm1": "0.layer_norm", "norm2": "1.layer_norm"}
    table |= {"ffn.gate.0": "1.DenseReluDense.wi_0", "ffn.fc1": "1.DenseReluDense.wi_1"}
    table |= {"ffn.fc2": "1.DenseReluDense.wo"}
    ours = {"shared.weight": state["token_embedding.weight"]}
    ours["encoder.embed_tokens.weight"] = ours["shared.weight"]
    ours["encoder.final_layer_norm.weight"] = state["norm.weight"]
    for i in range(2):
        for theirs, name in table.items():
            ours[f"encoder.block.{i}.layer.{name}.weight"] = state[f"blocks.{i}.{theirs}.weight"]
        shared = state.get("pos_embedding.embedding.weight")
        own = state.get(f"blocks.{i}.pos_embedding.embedding.weight", shared)
        assert own is not None
        ours[f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"] = own
    network.load_state_dict(ours)
    return network


@pytest.mark.parametrize("shared", [False, True])
def test_umt5_is_the_stock_network_cut_to_the_real_tokens(shared: bool) -> None:
    torch.manual_seed(0)
    state = tiny.random_state(tiny.umt5_shapes(shared=shared))
    encoder = umt5_from_published(state, UMT5)
    ids = torch.tensor([[3, 4, 5, 6, 7, 1, 0, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        expected = stock_umt5(state)(input_ids=ids, attention_mask=mask).last_hidden_state[:, :6]
    out = encoder.encode(ids, mask)
    assert close(out, expected) and not out.requires_grad
    assert close(encoder.encode(ids[:, :6]), expected)


def text_encoder(folder: Any, text_len: int) -> Umt5TextEncoder:
    tiny.write_tokenizer(folder)
    torch.manual_seed(0)
    state = tiny.random_state(tiny.umt5_shapes())
    return umt5_from_published(state, UMT5, folder_tokenizer(folder), text_len)


def test_umt5_cleans_tokenizes_and_ends_the_prompt(tmp_path: Any) -> None:
    encoder = text_encoder(tmp_path, 8)
    expected = encoder.encode(torch.tensor([[3, 4, 5, 6, 7, 1]]))[0]
    assert torch.equal(encoder("  a person\n is\ttalking .  "), expected)
    assert encoder("").shape == (1, 32), "the end token alone"


def test_umt5_truncates_and_keeps_the_end_token(tmp_path: Any) -> None:
    encoder = text_encoder(tmp_path, 4)
    assert torch.equal(encoder("a person is talking ."), encoder.encode(torch.tensor([[3, 4, 5, 1]]))[0])


def test_umt5_without_a_tokenizer_says_so() -> None:
    encoder = Umt5TextEncoder(umt5_config(UMT5), None, 8)
    with pytest.raises(ValueError, match="without a tokenizer"):
        encoder("a")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two\n\n lines \t", "two lines"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("schÃ¶n", "schön"),
        ("一个人在说话。", "一个人在说话。"),
        ("", ""),
    ],
)
def test_clean_prompt(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


def test_an_unreadable_tokenizer_is_named(tmp_path: Any) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=str(tmp_path)) as error:
        folder_tokenizer(tmp_path)
    assert "\n" not in str(error.value)

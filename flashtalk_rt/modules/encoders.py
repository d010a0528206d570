"""The three published encoders, on transformers' networks: wav2vec2 for speech, CLIP for the portrait, umT5
for the prompt. What surrounds the networks (normalisation, resizing, cleaning) is what the published DiT was
trained with; the golden cases pin it down.

Importing this module imports transformers, which takes seconds: the loaders do it only when they need it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from ..errors import CheckpointError, InputError

# OpenAI's CLIP statistics, RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The settings of a Wav2Vec2Config that change its output in evaluation. The rest of a published config.json
# (dropouts, masking, losses) belongs to training.
WAV2VEC2_SETTINGS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "conv_dim", "conv_stride", "conv_kernel", "conv_bias", "feat_extract_norm", "feat_extract_activation",
    "num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "do_stable_layer_norm", "layer_norm_eps",
)  # fmt: skip

Tokenize = Callable[[str], list[int]]
"""A cleaned prompt to token ids, the end token included, without padding; not yet truncated."""


def wav2vec2_config(settings: Mapping[str, Any]) -> Wav2Vec2Config:
    """The keys of WAV2VEC2_SETTINGS found in `settings` (a config.json, say) as a Wav2Vec2Config."""
    chosen = {key: settings[key] for key in WAV2VEC2_SETTINGS if key in settings}
    return Wav2Vec2Config(**chosen)


def clip_config(settings: Mapping[str, Any]) -> CLIPVisionConfig:
    """`image_size, patch_size, dim, heads, layers`, and optionally `activation, norm_eps, mlp_ratio`.

    An activation other than "gelu" and "quick_gelu" raises CheckpointError.
    """
    activation = settings.get("activation", "gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise CheckpointError(f'image encoder: activation "{activation}" is neither "gelu" nor "quick_gelu"')
    return CLIPVisionConfig(
        image_size=settings["image_size"],
        patch_size=settings["patch_size"],
        hidden_size=settings["dim"],
        intermediate_size=round(settings["dim"] * settings.get("mlp_ratio", 4)),
        num_attention_heads=settings["heads"],
        num_hidden_layers=settings["layers"],
        hidden_act=activation,
        layer_norm_eps=settings.get("norm_eps", 1e-5),
    )


def umt5_config(settings: Mapping[str, Any]) -> UMT5Config:
    """`vocab, dim, dim_attn, dim_ffn, heads, layers, num_buckets`."""
    return UMT5Config(
        vocab_size=settings["vocab"],
        d_model=settings["dim"],
        d_kv=settings["dim_attn"] // settings["heads"],
        d_ff=settings["dim_ffn"],
        num_heads=settings["heads"],
        num_layers=settings["layers"],
        relative_attention_num_buckets=settings["num_buckets"],
        feed_forward_proj="gated-gelu",
    )


class Wav2Vec2AudioEncoder(nn.Module):
    """Speech features of every transformer block, at the video's frame rate.

    The stock network, except that the convolution features (50 a second) are interpolated to the video
    frames before the projection.
    """

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        # Without masking probabilities the model holds no masked_spec_embed, which only training uses.
        unmasked = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
        self.model = Wav2Vec2Model(Wav2Vec2Config(**{**config.to_dict(), **unmasked}))
        self._norm_last = bool(config.do_stable_layer_norm)
        # The shortest input that the strided convolutions turn into one feature (400 samples, 25 ms).
        self._min_samples = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self._min_samples = (self._min_samples - 1) * stride + kernel
        self.eval()

    @torch.no_grad()
    def forward(self, samples: Tensor, frames: int) -> Tensor:
        """samples [N], 16 kHz, any scale -> [frames, blocks, dim] in the dtype of the weights.

        Fewer samples than one convolution feature needs (400), or frames < 1, raise InputError.
        """
        if samples.ndim != 1 or samples.numel() < self._min_samples or frames < 1:
            raise InputError(
                f"the audio encoder needs [N] samples with N >= {self._min_samples} and frames >= 1, "
                f"got samples {list(samples.shape)} and frames {frames}"
            )
        weight = self.model.feature_projection.projection.weight
        x = samples.to(weight.device, torch.float32)
        x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-7)
        features = self.model.feature_extractor(x[None].to(weight.dtype))  # [1, channels, T]
        features = F.interpolate(features, size=frames, mode="linear", align_corners=True)
        hidden, _ = self.model.feature_projection(features.transpose(1, 2))
        encoder = self.model.encoder
        hidden = hidden + encoder.pos_conv_embed(hidden)
        if not self._norm_last:
            hidden = encoder.layer_norm(hidden)
        states = []
        for layer in encoder.layers:
            hidden = layer(hidden)
            states.append(hidden)
        if self._norm_last:  # as transformers 4 lists the last state, which the published code ran
            states[-1] = encoder.layer_norm(hidden)
        return torch.cat(states).transpose(0, 1).contiguous()


class ClipImageEncoder(nn.Module):
    """Image tokens: CLIP's hidden state before its last block, which is therefore not even built."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        """`config` describes the whole published tower, its last block included."""
        super().__init__()
        kept = CLIPVisionConfig(**{**config.to_dict(), "num_hidden_layers": config.num_hidden_layers - 1})
        self.model = CLIPVisionModel(kept)
        self.model.post_layernorm = nn.Identity()  # type: ignore[assignment]  # it follows the last block
        # A constant, not a weight: it must hold its values even when the rest is built on the meta device.
        positions = self.model.embeddings.num_positions
        ids = torch.arange(positions, device="cpu")[None]
        self.model.embeddings.register_buffer("position_ids", ids, persistent=False)
        self._side = self.model.embeddings.image_size  # pixels; the patches need not fill it
        self.eval()

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """image [1, 3, 1, H, W] in [-1, 1] -> [1, 1 + patches, dim], the class token first (257 tokens for
        the published tower), in the dtype of the weights.
        """
        weight = self.model.embeddings.patch_embedding.weight
        pixels = image[:, :, 0].to(weight.device, torch.float32)
        pixels = F.interpolate(pixels, size=self._side, mode="bicubic", align_corners=False)
        mean = pixels.new_tensor(CLIP_MEAN)[:, None, None]
        std = pixels.new_tensor(CLIP_STD)[:, None, None]
        pixels = (pixels * 0.5 + 0.5 - mean) / std
        tokens: Tensor = self.model(pixel_values=pixels.to(weight.dtype)).last_hidden_state
        return tokens


class _Float32Linear(nn.Linear):
    """Without bias; computes in float32 whatever its weight is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


class _Float32LayerNorm(UMT5LayerNorm):
    """Stays in float32, where its base class rounds to the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.float(), self.variance_epsilon)


class _Float32Embedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


class Umt5TextEncoder(nn.Module):
    """Prompt tokens from the umT5 encoder.

    It computes in float32 whatever its weights are stored in: a session's prompt is encoded once, and in
    bfloat16 golden umt5-a erred by 2.04e-2 on an H100, over its bound of 2e-2.
    """

    def __init__(self, config: UMT5Config, tokenize: Tokenize | None, text_len: int) -> None:
        """Without a tokenizer only `encode` works."""
        super().__init__()
        # The encoder stack alone: the model around it holds the embedding a second time under another name.
        self.model = UMT5EncoderModel(config).encoder
        for module in self.model.modules():  # transformers builds its own layers
            if isinstance(module, nn.Linear):
                module.__class__ = _Float32Linear
            elif isinstance(module, nn.Embedding):  # of tokens, and of distances
                module.__class__ = _Float32Embedding
            elif isinstance(module, UMT5LayerNorm):
                module.__class__ = _Float32LayerNorm
        self._tokenize = tokenize
        self.text_len = text_len
        self.eval()

    def forward(self, prompt: str) -> Tensor:
        """-> [L, dim] float32: the real tokens, the end token included, L <= text_len."""
        if self._tokenize is None:
            raise ValueError("this text encoder was built without a tokenizer; only encode() works")
        ids = self._tokenize(clean_prompt(prompt))
        if len(ids) > self.text_len:
            # The end token stays last, as the tokenizers themselves truncate.
            ids = [*ids[: self.text_len - 1], ids[-1]]
        return self.encode(torch.tensor([ids], dtype=torch.long))[0]

    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids [1, L] integers and mask [1, L] of 1 (real) and 0 (padding), or none -> [1, real, dim].

        Padding is cut before the network: masked keys would take no part in the attention, and umT5's
        positions are relative, so the real tokens come out the same.
        """
        device = self.model.embed_tokens.weight.device
        if mask is not None:
            ids = ids[mask.bool()][None]
        states: Tensor = self.model(input_ids=ids.to(device)).last_hidden_state
        return states


def clean_prompt(prompt: str) -> str:
    """Mend broken Unicode, resolve HTML entities (twice: they are often escaped twice), collapse spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def folder_tokenizer(folder: Path) -> Tokenize:
    """The tokenizer saved in `folder` as tokenizer.json or spiece.model; CheckpointError if unreadable."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{folder}: cannot read the tokenizer ({_first_line(error)})") from error

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
        return ids

    return tokenize


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

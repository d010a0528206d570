"""The published files' names for the encoders' parameters, and the sizes that their shapes tell.

transformers' modules carry other names than the published CLIP and umT5 files; each `*_part` says where every
parameter comes from, each `*_settings` reads the network's sizes off the file.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ..errors import CheckpointError
from .weights import Part, Shape, Source, Take, Unused

CLIP_HEAD_DIM = 80  # ViT-H/14: 16 heads of 1280; no shape in the file tells


def size(source: Source, name: str, axis: int) -> int:
    """One axis of a tensor's shape; a tensor that is missing or has too few axes raises CheckpointError."""
    shape = source.shapes.get(name)
    if shape is None or len(shape) <= axis:
        found = "missing" if shape is None else f"of shape {list(shape)}"
        raise CheckpointError(f"{source.where}: {name} is {found}; is this the file of another model?")
    return shape[axis]


def _count(source: Source, pattern: str) -> int:
    """How many numbers `pattern`'s group takes over all names."""
    return len({match[1] for name in source.shapes if (match := re.match(pattern, name))})


def wav2vec2_part(source: Source) -> Part:
    """transformers' names, with or without the `wav2vec2.` of a pre-training checkpoint, the weight norm of
    the positional convolution in its older or newer spelling.
    """
    prefix = "wav2vec2." if any(name.startswith("wav2vec2.") for name in source.shapes) else ""
    norm = f"{prefix}encoder.pos_conv_embed.conv."
    old = f"{norm}weight_g" in source.shapes

    def rename(name: str, shape: Shape) -> Take:
        name = prefix + name.removeprefix("model.")
        if old:
            name = name.replace(f"{norm}parametrizations.weight.original0", f"{norm}weight_g")
            name = name.replace(f"{norm}parametrizations.weight.original1", f"{norm}weight_v")
        return Take(name, shape)

    return Part(
        source,
        rename,
        (
            Unused(f"{prefix}masked_spec_embed", "replaces masked frames in training"),
            Unused("quantizer.", "the pre-training loss"),
            Unused("project_hid.", "the pre-training loss"),
            Unused("project_q.", "the pre-training loss"),
        ),
    )


# CLIP ----------------------------------------------------------------------------------------------------

_CLIP_NAMES = {
    "embeddings.patch_embedding": "patch_embedding",
    "pre_layrnorm": "pre_norm",
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


def clip_settings(source: Source) -> dict[str, Any]:
    """The vision tower's sizes, for `encoders.clip_config`."""
    p = _clip_prefix(source)
    dim = size(source, f"{p}pos_embedding", 2)
    patch = size(source, f"{p}patch_embedding.weight", 3)
    return {
        "image_size": patch * math.isqrt(size(source, f"{p}pos_embedding", 1) - 1),
        "patch_size": patch,
        "dim": dim,
        "heads": max(1, dim // CLIP_HEAD_DIM),
        "layers": _count(source, rf"{re.escape(p)}transformer\.(\d+)\."),
        "mlp_ratio": size(source, f"{p}transformer.0.mlp.0.weight", 0) / dim,
        "activation": "gelu",
        "norm_eps": 1e-5,
    }


def _clip_prefix(source: Source) -> str:
    return "visual." if any(name.startswith("visual.") for name in source.shapes) else ""


def clip_part(source: Source, layers: int) -> Part:
    """The published vision tower of `layers` blocks, with or without the `visual.` of the two-tower file."""
    prefix = _clip_prefix(source)

    def rename(name: str, shape: Shape) -> Take:
        name = name.removeprefix("model.").replace("encoder.layers.", "transformer.")
        if name == "embeddings.class_embedding":
            return Take(f"{prefix}cls_embedding", (1, 1, *shape))
        if name == "embeddings.position_embedding.weight":
            return Take(f"{prefix}pos_embedding", (1, *shape))
        if match := re.search(r"self_attn\.([qkv])_proj", name):
            joint = (3 * shape[0], *shape[1:])
            return Take(prefix + name.replace(match[0], "attn.to_qkv"), joint, "qkv".index(match[1]), 3)
        for ours, theirs in _CLIP_NAMES.items():
            name = name.replace(ours, theirs)
        return Take(prefix + name, shape)

    return Part(
        source,
        rename,
        (
            Unused("textual.", "the text tower"),
            Unused("log_scale", "the contrastive loss"),
            Unused(f"{prefix}transformer.{layers - 1}.", "the features are taken before the last block"),
            Unused(f"{prefix}post_norm.", "follows the last block"),
            Unused(f"{prefix}head", "follows the last block"),
        ),
    )


# umT5 ----------------------------------------------------------------------------------------------------

_UMT5_NAMES = {
    "embed_tokens": "token_embedding",
    "final_layer_norm": "norm",
    "layer.0.layer_norm": "norm1",
    "layer.1.layer_norm": "norm2",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
_SHARED_POSITIONS = "pos_embedding.embedding.weight"


def umt5_settings(source: Source) -> dict[str, Any]:
    """The encoder's sizes, for `encoders.umt5_config`."""
    shared = _SHARED_POSITIONS in source.shapes
    positions = _SHARED_POSITIONS if shared else f"blocks.0.{_SHARED_POSITIONS}"
    return {
        "vocab": size(source, "token_embedding.weight", 0),
        "dim": size(source, "token_embedding.weight", 1),
        "dim_attn": size(source, "blocks.0.attn.q.weight", 0),
        "dim_ffn": size(source, "blocks.0.ffn.fc1.weight", 0),
        "heads": size(source, positions, 1),
        "layers": _count(source, r"blocks\.(\d+)\."),
        "num_buckets": size(source, positions, 0),
    }


def umt5_part(source: Source) -> Part:
    """The published umT5 encoder; one position embedding for all blocks, where the file shares it."""
    shared = _SHARED_POSITIONS in source.shapes

    def rename(name: str, shape: Shape) -> Take:
        name = re.sub(r"^block\.", "blocks.", name.removeprefix("model."))
        for ours, theirs in _UMT5_NAMES.items():
            name = name.replace(ours, theirs)
        return Take(_SHARED_POSITIONS if shared and name.endswith(_SHARED_POSITIONS) else name, shape)

    return Part(source, rename)

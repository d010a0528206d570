"""Every op the networks are made of, as differentiable torch functions."""

from . import chunk_attention as _chunk_attention
from . import conv3d as _conv3d
from . import residual_norm as _residual_norm
from ._dispatch import TORCH, OpSpec
from .chunk_attention import chunk_attention
from .conv3d import conv3d
from .fp8 import Quantized
from .reference import (
    adaln,
    audio_cross_attention,
    color_match,
    dual_cross_attention,
    gate_residual,
    lab_statistics,
    layer_norm,
    qk_norm_rope,
    rms_norm,
    rope_table,
)
from .residual_norm import residual_norm

# Every op and its backends, for `flashtalk doctor` and the parity tests.
_PLAIN = (
    "adaln",
    "audio_cross_attention",
    "color_match",
    "dual_cross_attention",
    "gate_residual",
    "layer_norm",
    "qk_norm_rope",
    "rms_norm",
)
REGISTRY: tuple[OpSpec, ...] = (
    _chunk_attention.SPEC,
    _conv3d.SPEC,
    _residual_norm.SPEC,
    *(OpSpec(name, (TORCH,)) for name in _PLAIN),
)

__all__ = [
    "REGISTRY",
    "Quantized",
    "adaln",
    "audio_cross_attention",
    "chunk_attention",
    "color_match",
    "conv3d",
    "dual_cross_attention",
    "gate_residual",
    "lab_statistics",
    "layer_norm",
    "qk_norm_rope",
    "residual_norm",
    "rms_norm",
    "rope_table",
]

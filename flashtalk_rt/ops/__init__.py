"""Every op the networks are made of, as differentiable torch functions."""

from .chunk_attention import chunk_attention
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

__all__ = [
    "adaln",
    "audio_cross_attention",
    "chunk_attention",
    "color_match",
    "dual_cross_attention",
    "gate_residual",
    "lab_statistics",
    "layer_norm",
    "qk_norm_rope",
    "rms_norm",
    "rope_table",
]

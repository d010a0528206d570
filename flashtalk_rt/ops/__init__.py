"""Every op the networks are made of, as differentiable torch functions."""

from . import add_residual as _add_residual
from . import audio_cross_attention as _audio_cross_attention
from . import chunk_attention as _chunk_attention
from . import color_match as _color_match
from . import conv3d as _conv3d
from . import double_frames as _double_frames
from . import dual_cross_attention as _dual_cross_attention
from . import fp8 as _fp8
from . import linear as _linear
from . import norm_silu as _norm_silu
from . import pixel_attention as _pixel_attention
from . import qk_norm_rope as _qk_norm_rope
from . import quantized_attention as _quantized_attention
from . import residual_norm as _residual_norm
from . import slice_conv as _slice_conv
from . import upsample_conv as _upsample_conv
from . import vae_head as _vae_head
from ._dispatch import TORCH, OpSpec, plain_backends, plainly
from .add_residual import add_residual
from .audio_cross_attention import (
    AudioWork,
    absorb_audio,
    absorbed_audio_attention,
    audio_cross_attention,
    audio_form,
)
from .chunk_attention import chunk_attention
from .color_match import color_match, color_match_pixels, lab_statistics
from .conv3d import CHANNEL_MULTIPLE, conv3d
from .double_frames import double_frames
from .dual_cross_attention import dual_cross_attention, padding_bias
from .fp8 import FP8, Quantized, quantize
from .linear import linear_fp8
from .norm_silu import add_norm_silu, norm_silu
from .pixel_attention import pixel_attention
from .qk_norm_rope import qk_norm_rope
from .quantized_attention import quantized_attention
from .reference import rms_norm, rope_table
from .reference_vae import with_past
from .residual_norm import adaln, gate_residual, layer_norm, residual_norm
from .slice_conv import slice_conv, slice_conv_wins
from .upsample_conv import fold_upsampled, upsample_conv
from .vae_head import vae_head

# Every op and its backends, for `flashtalk doctor` and the parity tests.
_PLAIN = ("rms_norm",)
REGISTRY: tuple[OpSpec, ...] = (
    _add_residual.SPEC,
    _audio_cross_attention.SPEC,
    _audio_cross_attention.ABSORBED_SPEC,
    _chunk_attention.SPEC,
    _color_match.LAB_STATISTICS,
    _color_match.COLOR_MATCH,
    _color_match.COLOR_MATCH_PIXELS,
    _conv3d.SPEC,
    _double_frames.SPEC,
    _dual_cross_attention.SPEC,
    _fp8.SPEC,
    _linear.SPEC,
    _norm_silu.NORM_SILU,
    _norm_silu.ADD_NORM_SILU,
    _pixel_attention.SPEC,
    _qk_norm_rope.SPEC,
    _quantized_attention.SPEC,
    _residual_norm.SPEC,
    _residual_norm.ADALN,
    _residual_norm.LAYER_NORM,
    _residual_norm.GATE_RESIDUAL,
    _slice_conv.SPEC,
    _upsample_conv.SPEC,
    _vae_head.SPEC,
    *(OpSpec(name, (TORCH,)) for name in _PLAIN),
)

__all__ = [
    "CHANNEL_MULTIPLE",
    "FP8",
    "REGISTRY",
    "AudioWork",
    "Quantized",
    "absorb_audio",
    "absorbed_audio_attention",
    "adaln",
    "add_norm_silu",
    "add_residual",
    "audio_cross_attention",
    "audio_form",
    "chunk_attention",
    "color_match",
    "color_match_pixels",
    "conv3d",
    "double_frames",
    "dual_cross_attention",
    "fold_upsampled",
    "gate_residual",
    "lab_statistics",
    "layer_norm",
    "linear_fp8",
    "norm_silu",
    "padding_bias",
    "pixel_attention",
    "plain_backends",
    "plainly",
    "qk_norm_rope",
    "quantize",
    "quantized_attention",
    "residual_norm",
    "rms_norm",
    "rope_table",
    "slice_conv",
    "slice_conv_wins",
    "upsample_conv",
    "vae_head",
    "with_past",
]

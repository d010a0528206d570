"""The published encoders from state dicts in memory, as the golden cases have them: float32, on the CPU.

`flashtalk_rt.load` builds them from files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Wav2Vec2Config

from flashtalk_rt.modules.encoder_names import clip_part, umt5_part, wav2vec2_part
from flashtalk_rt.modules.encoders import (
    ClipImageEncoder,
    Tokenize,
    Umt5TextEncoder,
    Wav2Vec2AudioEncoder,
    clip_config,
    umt5_config,
)
from flashtalk_rt.modules.weights import StateSource, fill

CPU = torch.device("cpu")
State = Mapping[str, Tensor]  # under the published names


def wav2vec2_from_published(state: State, config: Wav2Vec2Config) -> Wav2Vec2AudioEncoder:
    encoder = Wav2Vec2AudioEncoder(config)
    fill(encoder, wav2vec2_part(StateSource("wav2vec2 weights", state)), CPU, torch.float32)
    return encoder


def clip_from_published(state: State, settings: Mapping[str, Any]) -> ClipImageEncoder:
    """settings: as `clip_config` takes them."""
    encoder = ClipImageEncoder(clip_config(settings))
    fill(encoder, clip_part(StateSource("CLIP weights", state), settings["layers"]), CPU, torch.float32)
    return encoder


def umt5_from_published(
    state: State, settings: Mapping[str, Any], tokenize: Tokenize | None = None, text_len: int = 512
) -> Umt5TextEncoder:
    """settings: as `umt5_config` takes them; others (a golden case's `shared_pos`) are not read."""
    encoder = Umt5TextEncoder(umt5_config(settings), tokenize, text_len)
    fill(encoder, umt5_part(StateSource("umT5 weights", state)), CPU, torch.float32)
    return encoder

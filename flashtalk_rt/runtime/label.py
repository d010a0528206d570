"""A short text drawn on every frame, so that a toy's pictures say what made them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def label_mask(text: str, height: int, width: int) -> Tensor:
    """Opacity of `text` in the lower left corner: [H, W] float32 in [0, 1]; empty text gives zeros."""
    image = Image.new("L", (width, height))
    size = max(9, height // 24)
    position = (size // 3, height - size - size // 2)
    ImageDraw.Draw(image).text(position, text, fill=255, font=ImageFont.load_default(size))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def draw_label(frames: Tensor, mask: Tensor) -> Tensor:
    """frames uint8 [T, H, W, 3] -> the same with the mask's text in white over a darkened edge."""
    if not bool(mask.any()):
        return frames
    edge = torch.nn.functional.max_pool2d(mask[None], 3, stride=1, padding=1)[0]
    drawn = frames.float() * (1 - 0.6 * edge[..., None])
    return (drawn + (255 - drawn) * mask[..., None]).round().to(torch.uint8)

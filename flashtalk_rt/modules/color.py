"""Colour matching to the reference image, whose statistics are measured once a session."""

from __future__ import annotations

from torch import Tensor

from .. import ops


class ColorReference:
    """The Lab statistics of one reference image."""

    def __init__(self, image: Tensor, strength: float) -> None:
        """image [1, 3, 1, H, W] in [-1, 1]; strength in [0, 1], 0 leaves frames alone."""
        self._strength = strength
        self._mean, self._std = ops.lab_statistics(image)

    def match(self, frames: Tensor) -> Tensor:
        """frames [1, 3, T, H, W] in [-1, 1] -> the same, matched."""
        return ops.color_match(frames, self._mean, self._std, self._strength)

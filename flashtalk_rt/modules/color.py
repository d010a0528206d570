"""Colour matching to the reference image, whose statistics are measured once a session."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .. import ops


@dataclasses.dataclass(frozen=True)
class ColorReference:
    """The Lab statistics of one reference image, and how far frames are moved towards them."""

    mean: Tensor  # [1, 1, 3, 1, 1] float32
    std: Tensor
    strength: float  # in [0, 1]; 0 leaves frames alone

    @classmethod
    def of(cls, image: Tensor, strength: float) -> ColorReference:
        """image [1, 3, 1, H, W] in [-1, 1]."""
        return cls(*ops.lab_statistics(image), strength)

    def match(self, frames: Tensor, into: tuple[Tensor, Tensor]) -> None:
        """frames [1, 3, T, H, W] in [-1, 1] -> `into`: the same, matched, float32, and their pixels, uint8
        [1, T, H, W, 3]; laid out as `ops.color_match_pixels` says."""
        ops.color_match_pixels(frames, self.mean, self.std, self.strength, into=into)

"""The reference portrait: from a file, a Pillow image or an array to the tensor the networks see.

torch is imported where it is used, so that the command can refuse a bad picture without waiting for it.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .. import files
from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

MIN_SIDE_PX = 64
# Pillow warns here and refuses at twice this; we refuse here, and hold the resized picture to it too.
MAX_PIXELS = 89_478_485
# A transparent picture is laid on mid-grey: 0 in the networks' [-1, 1], the value of their empty frames.
BACKDROP = (128, 128, 128, 255)

Picture = str | Path | Image.Image | npt.NDArray[np.uint8]


def open_image(path: str | Path) -> Image.Image:
    """Read any still picture Pillow reads (of an animation, the first frame) as upright 8-bit RGB.

    EXIF rotation is applied; transparency is composited over mid-grey; CMYK, palette and 16-bit
    pictures become 8-bit RGB.  Raises InputError: missing, not an image, truncated, more than
    `MAX_PIXELS`, or a side under `MIN_SIDE_PX`.
    """
    path = Path(path)
    files.check_input(path, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(_too_large(f"image {path}")) from None
    except UnidentifiedImageError:
        raise InputError(f"image {path} is not a picture that Pillow can read; give a PNG or JPEG") from None
    except PermissionError:
        raise InputError(f"image {path} cannot be read: permission denied") from None
    except Exception as error:  # Pillow's header parsers raise many types on hostile bytes
        raise InputError(f"image {path} cannot be read: {error}") from error
    with image:
        return to_rgb(image, f"image {path}")


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Any Pillow image as upright RGB (see `open_image`); `name` begins the text of an InputError."""
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_too_large(name))
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = _to_8_bit(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKDROP), image)
        rgb = image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(f"{name} is truncated or damaged: {error}") from error
    if min(rgb.size) < MIN_SIDE_PX:
        raise InputError(
            f"{name} is {rgb.width} x {rgb.height} pixels (width x height); "
            f"each side must be at least {MIN_SIDE_PX}"
        )
    return rgb


def load_image(image: Picture, height: int, width: int) -> Tensor:
    """The reference picture, scaled to cover height x width (bilinear) and cropped at its centre.

    `image` is a path, a Pillow image, or a uint8 array [H, W, 3].
    Returns float32 [1, 3, 1, height, width] in [-1, 1].  Raises InputError as `open_image` does.
    The sizes round as the published code rounds them (up, and the crop's corner to the nearest even).
    """
    import torch

    if isinstance(image, str | Path):
        rgb = open_image(image)
    elif isinstance(image, np.ndarray):
        rgb = to_rgb(_from_array(image))
    elif isinstance(image, Image.Image):
        rgb = to_rgb(image)
    else:
        raise InputError(f"image is a {type(image).__name__}; give a path, a Pillow image or a uint8 array")
    if height * width > MAX_PIXELS:
        raise InputError(
            f"a {height} x {width} (height x width) video has more than {MAX_PIXELS:,} pixels a frame; "
            "take a smaller size"
        )
    scale = max(height / rgb.height, width / rgb.width)
    scaled_height, scaled_width = math.ceil(scale * rgb.height), math.ceil(scale * rgb.width)
    if scaled_height * scaled_width > MAX_PIXELS:
        raise InputError(
            f"image is {rgb.width} x {rgb.height} pixels (width x height), too long and thin "
            f"for a {height} x {width} (height x width) video; crop it first"
        )
    scaled = np.asarray(rgb.resize((scaled_width, scaled_height), Image.Resampling.BILINEAR))
    top, left = round((scaled_height - height) / 2), round((scaled_width - width) / 2)
    pixels = scaled[top : top + height, left : left + width].transpose(2, 0, 1)
    return (torch.from_numpy(pixels.astype(np.float32)) / 255 - 0.5)[None, :, None] * 2


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Greyscale deeper than 8 bits -> mode L.

    16-bit modes span 0..65535.  The 32-bit modes do not say their range: "I" is read as 16-bit when
    anything exceeds 255, and "F" as 0..1 when nothing exceeds 1.
    """
    values: npt.NDArray[Any] = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        unit = 1.0 / 255.0 if values.max() <= 1.0 else 1.0
    else:
        unit = 257.0 if image.mode.startswith("I;16") or values.max() > 255.0 else 1.0
    return Image.fromarray(np.rint(np.clip(values / unit, 0.0, 255.0)).astype(np.uint8))


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(
            f"image array is {array.dtype} {list(array.shape)}; give uint8 [height, width, 3] in RGB"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _too_large(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS:,} pixels (a decompression bomb?); scale it down first"

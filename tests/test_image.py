"""Pictures in: every kind that is promised, and every refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from media_files import picture
from PIL import Image

from flashtalk_rt.errors import InputError
from flashtalk_rt.modules.image import load_image, open_image


def corner(image: Image.Image) -> tuple[int, ...]:
    return tuple(np.asarray(image)[5, 5].tolist())


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown by turning it a quarter to the right: the left half comes to the top
    picture().save(tmp_path / "a.png", exif=exif)
    image = open_image(tmp_path / "a.png")
    assert image.size == (80, 120)
    assert np.asarray(image)[5, 75].tolist() == [200, 40, 90]
    assert np.asarray(image)[115, 5].tolist() == [20, 180, 60]


def test_transparency_lies_on_mid_grey(tmp_path: Path) -> None:
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.uint8([0, 255]), (80, 60))))
    image.save(tmp_path / "a.png")
    pixels = np.asarray(open_image(tmp_path / "a.png"))
    assert (pixels[:, 0::2] == 128).all()
    assert pixels[0, 1].tolist() == [200, 40, 90]


@pytest.mark.parametrize(
    ("mode", "name", "tolerance"),
    [
        ("RGB", "a.png", 0),
        ("CMYK", "a.jpg", 30),
        ("CMYK", "a.tif", 1),
        ("RGB", "a.gif", 30),
        ("RGB", "a.webp", 30),
    ],
)
def test_colour_modes_keep_the_colour(tmp_path: Path, mode: str, name: str, tolerance: int) -> None:
    picture().convert(mode).save(tmp_path / name)
    assert np.abs(np.subtract(corner(open_image(tmp_path / name)), (200, 40, 90))).max() <= tolerance


def test_a_transparent_palette_entry_lies_on_mid_grey(tmp_path: Path) -> None:
    image = Image.fromarray(np.tile(np.uint8([0, 1]), (80, 50)), mode="L").convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=0)
    pixels = np.asarray(open_image(tmp_path / "a.png"))
    assert pixels[0, 0].tolist() == [128, 128, 128]
    assert pixels[0, 1].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (np.uint16([0, 257 * 100, 65535]), "a.png"),
        (np.uint16([0, 257 * 100, 65535]), "a.tif"),
        (np.int32([0, 257 * 100, 65535]), "a.tif"),
        (np.float32([0, 100 / 255, 1]), "a.tif"),
        (np.float32([0, 100, 255]), "a.tif"),
        (np.uint8([0, 100, 255]), "a.png"),
    ],
    ids=["16-bit png", "16-bit tiff", "32-bit tiff", "float 0..1", "float 0..255", "8-bit grey"],
)
def test_greys_of_any_depth_span_black_to_white(tmp_path: Path, values: np.ndarray, name: str) -> None:
    Image.fromarray(np.tile(values.repeat(30), (90, 1))).save(tmp_path / name)
    pixels = np.asarray(open_image(tmp_path / name))
    assert [pixels[0, x].tolist() for x in (0, 45, 89)] == [[0] * 3, [100] * 3, [255] * 3]


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (70, 70), "red"), Image.new("RGB", (70, 70), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert np.abs(np.subtract(corner(open_image(tmp_path / "a.gif")), (255, 0, 0))).max() <= 8


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 128), (128, 64), (80, 80)])
@pytest.mark.parametrize("size", [(96, 96), (301, 177), (64, 333)])
def test_the_picture_covers_the_video_and_is_cut_at_its_centre(
    height: int, width: int, size: tuple[int, int]
) -> None:
    across = np.linspace(0, 255, size[0]).astype(np.uint8)
    down = np.linspace(0, 255, size[1]).astype(np.uint8)
    source = np.stack([np.tile(across, (size[1], 1)), np.tile(down[:, None], (1, size[0]))] * 2, -1)[..., :3]
    tensor = load_image(source, height, width)
    assert tensor.shape == (1, 3, 1, height, width)
    assert tensor.dtype.is_floating_point and tensor.abs().max() <= 1
    scale = max(height / size[1], width / size[0])
    for axis, (side, full) in enumerate([(width, size[0]), (height, size[1])]):
        ramp = tensor[0, axis, 0].mean(axis) if axis == 0 else tensor[0, axis, 0].mean(1)
        # Pixel i of the crop shows the place (i + 0.5 - side / 2) / scale from the picture's centre.
        place = (np.arange(side) + 0.5 - side / 2) / scale + full / 2
        expected = (place - 0.5) / (full - 1) * 2 - 1
        assert np.abs(ramp.numpy() - expected)[3:-3].max() < 0.03


def test_black_and_white_become_minus_one_and_one() -> None:
    assert load_image(np.zeros((64, 64, 3), np.uint8), 64, 64).eq(-1).all()
    assert load_image(np.full((64, 64, 3), 255, np.uint8), 64, 64).eq(1).all()
    assert load_image(Image.new("RGB", (64, 64), (51, 51, 51)), 64, 64).allclose(
        load_image(np.full((64, 64, 3), 51, np.uint8), 64, 64)
    )


def test_bad_picture_files_are_refused_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (100, 100, 3), np.uint8))
    for kind in ("png", "jpg", "tif", "webp", "gif", "bmp"):
        noise.save(tmp_path / f"whole.{kind}")
        data = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture\n" * 50)
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (63, 200)).save(tmp_path / "small.png")
    wanted = {
        "missing.png": "does not exist",
        ".": "not a file",
        "text.png": "not a picture",
        "empty.png": "not a picture",
        "bomb.png": "decompression bomb",
        "small.png": "63 x 200 pixels",
        **{f"cut.{kind}": "truncated|cannot be read" for kind in ("png", "jpg", "tif", "webp", "gif", "bmp")},
    }
    for name, text in wanted.items():
        with pytest.raises(InputError, match=text) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64, 4), np.uint8), r"\[64, 64, 4\]"),
        (np.zeros((64, 63, 3), np.uint8), "63 x 64"),
        (np.zeros((64, 100_000, 3), np.uint8), "too long and thin"),
        (3, "a int"),
    ],
    ids=["float", "4 channels", "small", "thin", "a number"],
)
def test_bad_arrays_are_refused(value: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load_image(value, 768, 448)  # type: ignore[arg-type]

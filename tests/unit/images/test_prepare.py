"""Images as the model sees them: sizes, pixels, orientations and colours."""

from __future__ import annotations

import io
import math
import random
import sys

import numpy as np
import pytest
from PIL import Image

from kimi_mlx.errors import ImageError
from kimi_mlx.images.prepare import prepare_image
from kimi_mlx.images.prepared import PreparedImage


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(prepared: PreparedImage) -> np.ndarray:
    """Return the padded pixels of the first frame, put together again from the patches: (height, width, 3)."""
    _, rows, columns = prepared.grid
    patches = prepared.patches[: rows * columns]
    lines = [
        np.concatenate([patches[row * columns + column].transpose(1, 2, 0) for column in range(columns)], axis=1)
        for row in range(rows)
    ]
    return np.concatenate(lines)


def expected_pixels(image: Image.Image) -> np.ndarray:
    """Return what Kimi K2.5's rule makes of an image, as stated in prose: shrink, PIL's bicubic, pad with zeros."""
    width, height = image.size
    num_patches = max(1, width // 14) * max(1, height // 14)
    scale = min(1, math.sqrt(16384 / num_patches), 7168 / width, 7168 / height)
    size = (max(1, math.floor(width * scale)), max(1, math.floor(height * scale)))
    small = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    return np.pad(small, ((0, -size[1] % 28), (0, -size[0] % 28), (0, 0)))


SIDES = random.Random(14)
SIZES = [
    *((1, 1), (27, 28), (28, 29), (29, 56), (1, 100_000), (100_000, 1), (12_000, 40), (40, 12_000), (7168, 14)),
    *((489, 7081), (7169, 15), (1792, 1792), (1793, 1793), (3000, 1500)),
    *((SIDES.randrange(1, 60), SIDES.randrange(1, 60)) for _ in range(60)),
    *((SIDES.randrange(1, 700), SIDES.randrange(1, 700)) for _ in range(90)),
    *((SIDES.randrange(1, 12_000), SIDES.randrange(1, 41)) for _ in range(20)),
    *((SIDES.randrange(1, 41), SIDES.randrange(1, 12_000)) for _ in range(20)),
]


def noise(size: tuple[int, int]) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(size).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize(
    "start", [0, *(pytest.param(start, marks=pytest.mark.slow) for start in range(50, len(SIZES), 50))]
)
def test_sizes_and_pixels_are_those_of_the_rule(start: int) -> None:
    for size in SIZES[start : start + 50]:
        image = noise(size)
        prepared = prepare_image(file_of(image, "BMP"), "x.bmp")
        expected = expected_pixels(image)
        assert np.array_equal(pixels_of(prepared), expected), size
        assert prepared.grid == (1, expected.shape[0] // 14, expected.shape[1] // 14)
        assert prepared.num_tokens * 28 * 28 == expected.shape[0] * expected.shape[1]
        assert prepared.size == size


CORNERS = {(0, 0): "red", (42, 0): "green", (42, 14): "blue", (0, 14): "yellow"}
COLOUR_VALUES = {"red": (172, 0, 0), "green": (0, 172, 0), "blue": (0, 0, 172), "yellow": (172, 172, 0)}


def four_corners() -> Image.Image:
    """Return a picture of 56 x 28 pixels with another colour in each corner: red, green, blue, yellow clockwise."""
    image = Image.new("RGB", (56, 28), (90, 90, 90))
    for (left, top), colour in CORNERS.items():
        image.paste(COLOUR_VALUES[colour], (left, top, left + 14, top + 14))
    return image


def corner_colours(prepared: PreparedImage) -> list[str]:
    """Return the names of the colours in the corners, clockwise from the upper left."""
    pixels = pixels_of(prepared).astype(int)
    corners = (pixels[3, 3], pixels[3, -4], pixels[-4, -4], pixels[-4, 3])
    return [min(COLOUR_VALUES, key=lambda name: abs(corner - COLOUR_VALUES[name]).sum()) for corner in corners]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    prepared = prepare_image(file_of(four_corners(), kind, exif=exif), "x")
    stored = ["red", "green", "blue", "yellow"]
    shown = {  # stored corners in the upper left, upper right, lower right and lower left of what a viewer shows
        1: [0, 1, 2, 3],
        2: [1, 0, 3, 2],
        3: [2, 3, 0, 1],
        4: [3, 2, 1, 0],
        5: [0, 3, 2, 1],
        6: [3, 0, 1, 2],
        7: [2, 1, 0, 3],
        8: [1, 2, 3, 0],
    }[orientation]
    assert corner_colours(prepared) == [stored[at] for at in shown]
    assert prepared.size == ((28, 56) if orientation > 4 else (56, 28))


def with_transparency(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


GREY_16 = Image.fromarray(np.arange(0, 65_280, 102, dtype=np.uint16).reshape(16, 40))
COLOURS = {
    "grey": (noise((40, 30)).convert("L"), "PNG", {}),
    "black and white": (noise((40, 30)).convert("1"), "PNG", {}),
    "transparency": (with_transparency(noise((40, 30))), "PNG", {}),
    "grey with transparency": (with_transparency(noise((40, 30)).convert("L")), "PNG", {}),
    "palette": (noise((40, 30)).quantize(50), "PNG", {}),
    "palette with one transparent colour": (noise((40, 30)).quantize(50), "PNG", {"transparency": 3}),
    "palette with transparencies": (noise((40, 30)).quantize(50), "PNG", {"transparency": bytes(range(50))}),
    "colour with one transparent colour": (noise((40, 30)), "PNG", {"transparency": (1, 2, 3)}),
    "CMYK": (noise((40, 30)).convert("CMYK"), "TIFF", {}),
    "CMYK in JPEG": (noise((40, 30)).convert("CMYK"), "JPEG", {}),
    "LAB": (noise((40, 30)).convert("LAB"), "TIFF", {}),
    "bitmap with a palette": (noise((40, 30)).quantize(50), "BMP", {}),
    "transparent GIF": (noise((40, 30)).quantize(50), "GIF", {"transparency": 3}),
    "progressive JPEG": (noise((40, 30)), "JPEG", {"progressive": True}),
    "LZW": (noise((40, 30)), "TIFF", {"compression": "tiff_lzw"}),
    "lossless WebP": (with_transparency(noise((40, 30))), "WEBP", {"lossless": True, "exact": True}),
}


@pytest.mark.parametrize("name", sorted(COLOURS))
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of the reference, not of our code
def test_colours_are_those_of_pil(name: str) -> None:
    image, kind, options = COLOURS[name]
    data = file_of(image, kind, **options)
    with Image.open(io.BytesIO(data)) as reference:
        expected = expected_pixels(reference.convert("RGB"))
    assert np.array_equal(pixels_of(prepare_image(data, "x")), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_the_upper_8_bits(kind: str) -> None:
    pixels = pixels_of(prepare_image(file_of(GREY_16, kind), "x"))
    assert np.array_equal(pixels[:16, :40], np.repeat((np.asarray(GREY_16) >> 8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (30, 20), (10 * number, 0, 250)) for number in range(20)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert prepare_image(data, "x").digest == prepare_image(file_of(frames[0]), "x").digest


def test_heic_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    data = file_of(four_corners(), "HEIF", quality=90)
    assert corner_colours(prepare_image(data, "photo.heic")) == ["red", "green", "blue", "yellow"]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"`photo.heic`: HEIC images need the package") as raised:
        prepare_image(data, "photo.heic")
    assert "install pillow-heif" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("data", "reason", "hint"),
    [
        (b"", "the file is empty", "save it again"),
        (b"%PDF-1.7\n%\xe2\xe3", "it is a PDF file, which is not read as an image", "save its pages as PNG or JPEG"),
        (b"\0\0\0\x1cftypisom\0\0\2\0", "it is a video, which is not read as an image", "send it as a video"),
        (b"\0\0\0\x14ftypqt  \0\0\2\0", "it is a video, which is not read as an image", "send it as a video"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81", "it is a video, which is not read as an image", "send it as a video"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "it is an AVIF or JPEG XL file", "save it as PNG or JPEG"),
        (b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='x'/>", "it is an SVG file", "save it as PNG or JPEG"),
        (b"\n<!DOCTYPE html>\n<html>", "it is a web page, which is not read as an image", "download the image itself"),
        ("Grüße\n".encode(), "it is a text file, which is not read as an image", "send it as text"),
        (b"PK\x03\x04\x14\0", "it is an archive or an Office document", "save its images"),
        (b"\x01\x02\x03\x04\x05", "it is not a PNG, JPEG, .*; it begins with 01 02 03 04 05", "save it as PNG or JPEG"),
    ],
)
def test_other_files_are_named(data: bytes, reason: str, hint: str) -> None:
    with pytest.raises(ImageError, match=rf"`x`: {reason}") as raised:
        prepare_image(data, "x")
    assert hint in str(raised.value.hint)

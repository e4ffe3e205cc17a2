"""Images as the model sees them: sizes, pixels, orientations and colours."""

from __future__ import annotations

import io
import math
import random

import numpy as np
import pytest
from PIL import Image

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
    *((7169, 15), (1792, 1792), (1793, 1793), (3000, 1500), (2500, 2000)),
    *((SIDES.randrange(1, 60), SIDES.randrange(1, 60)) for _ in range(60)),
    *((SIDES.randrange(1, 700), SIDES.randrange(1, 700)) for _ in range(90)),
    *((SIDES.randrange(1, 12_000), SIDES.randrange(1, 41)) for _ in range(20)),
    *((SIDES.randrange(1, 41), SIDES.randrange(1, 12_000)) for _ in range(20)),
]


def noise(size: tuple[int, int]) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(size).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("start", range(0, len(SIZES), 50))
def test_sizes_and_pixels_are_those_of_the_rule(start: int) -> None:
    for size in SIZES[start : start + 50]:
        image = noise(size)
        prepared = prepare_image(file_of(image, "BMP"), "x.bmp")
        expected = expected_pixels(image)
        assert np.array_equal(pixels_of(prepared), expected), size
        assert prepared.grid == (1, expected.shape[0] // 14, expected.shape[1] // 14)
        assert prepared.num_tokens * 28 * 28 == expected.shape[0] * expected.shape[1]
        assert prepared.size == size

"""Pictures for benchmarks: colour gradients with noise, from a seed."""

from __future__ import annotations

import numpy as np
from PIL import Image

from kimi_mlx.images.prepared import PreparedImage, to_patches
from kimi_mlx.images.preprocessing import DEFAULT_PREPROCESSING, Preprocessing

NOISE = 32
"""Maximum of the noise, in levels of 0 to 255."""


def make_picture(
    size: tuple[int, int], seed: tuple[int, ...], preprocessing: Preprocessing = DEFAULT_PREPROCESSING
) -> PreparedImage:
    """Return a picture that depends only on the arguments, ready for the vision tower.

    Args:
        size: width and height in pixels.
        seed: seed of its colours and of its noise.
        preprocessing: settings of the checkpoint.
    """
    width, height = size
    random = np.random.default_rng(seed)
    corners = random.integers(0, 256 - NOISE, (2, 2, 3)).astype(np.float32)
    x, y = np.linspace(0, 1, width, dtype=np.float32)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    top, bottom = (row[0] * (1 - x) + row[1] * x for row in corners)
    noise = random.integers(0, NOISE, (height, width, 3))
    image = Image.fromarray((top * (1 - y) + bottom * y + noise).astype(np.uint8))
    return to_patches([image], preprocessing.in_patch_limit, preprocessing.patch_limit_on_one_side)

"""The size at which the model sees an image: Kimi K2.5's rule."""

from __future__ import annotations

import math

PATCH_SIZE = 14
"""Side of a patch, in pixels."""
MERGE = 2
"""Side of the square of patches that become one token."""
CELL = PATCH_SIZE * MERGE
"""Side of a token's square, in pixels. Images are padded to multiples of it."""


def resized_size(width: int, height: int, max_patches: int, max_patches_per_side: int) -> tuple[int, int]:
    """Return the width and height to which an image is shrunk, in pixels, before padding. It is never enlarged.

    Args:
        width: width of the image, in pixels.
        height: height of the image, in pixels.
        max_patches: limit of the number of whole patches.
        max_patches_per_side: limit of the patches in a row or column.

    Source: `navit_resize_image` in the image processor that Moonshot publishes with Kimi K2.5.
    """
    max_side = max_patches_per_side * PATCH_SIZE
    num_patches = max(1.0, width // PATCH_SIZE) * max(1.0, height // PATCH_SIZE)
    scale = min(1.0, math.sqrt(max_patches / num_patches), max_side / width, max_side / height)
    return min(max(1, int(width * scale)), max_side), min(max(1, int(height * scale)), max_side)


def grid_size(width: int, height: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image after padding.

    Args:
        width: width after resizing, in pixels.
        height: height after resizing, in pixels.
    """
    return MERGE * math.ceil(height / CELL), MERGE * math.ceil(width / CELL)

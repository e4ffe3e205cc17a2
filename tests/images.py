"""Prompts with images for the tiny model of the golden file k2.5."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from kimi_mlx.engine.request import ImageInput

Grid = tuple[int, int, int]

PLACEHOLDER = 187
"""`media_placeholder_token_id` of the tiny model."""


def make_image(seed: int, grid: Grid = (1, 4, 6)) -> ImageInput:
    """Return an image of random pixels, at position 0."""
    patches = np.random.default_rng(seed).integers(0, 256, (int(np.prod(grid)), 3, 14, 14), np.uint8)
    digest = hashlib.blake2b(repr(grid).encode() + patches.tobytes(), digest_size=16).hexdigest()
    return ImageInput(0, grid[1] * grid[2] // 4, grid, digest, patches)


def make_prompt(*parts: Sequence[int] | ImageInput) -> tuple[tuple[int, ...], tuple[ImageInput, ...]]:
    """Return token ids and images of a prompt made of token ids and images."""
    ids: list[int] = []
    images: list[ImageInput] = []
    for part in parts:
        if isinstance(part, ImageInput):
            images.append(ImageInput(len(ids), part.num_tokens, part.grid, part.digest, part.patches))
            ids += [PLACEHOLDER] * part.num_tokens
        else:
            ids += part
    return tuple(ids), tuple(images)

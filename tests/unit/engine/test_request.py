"""Requests with images: positions, keys of caches, JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from kimi_mlx.engine.request import FIRST_IMAGE_KEY, ImageInput, Request
from kimi_mlx.errors import UsageError

PATCHES = np.zeros((24, 3, 14, 14), np.uint8)
IMAGE = ImageInput(2, 6, (1, 4, 6), "0123456789abcdef" * 2, PATCHES)
REQUEST = Request((1, 2, *[9] * 6, 3), images=(IMAGE,))


def test_keys_of_images_are_above_all_tokens_and_distinguish_images() -> None:
    key = REQUEST.cache_key()
    assert key[:2] + key[8:] == [1, 2, 3]
    assert key[2:8] == [IMAGE.key] * 6
    other = replace(IMAGE, digest="f" * 32)
    assert FIRST_IMAGE_KEY <= IMAGE.key < other.key < 2**63
    assert np.array([other.key], np.int64)[0] == other.key


def test_images_travel_as_json_without_their_patches() -> None:
    value = json.loads(json.dumps(REQUEST.to_dict()))
    received = Request.from_dict(value)
    assert received == REQUEST
    assert received.images[0].patches is None
    with_patches = Request.from_dict(value, {IMAGE.digest: PATCHES})
    assert with_patches.images[0].patches is PATCHES


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"grid": (1, 4, 4)}, "needs 16 patches"),
        ({"patches": PATCHES.astype(np.float32)}, "float32"),
        ({"patches": PATCHES[:, :2]}, "3 colours"),
        ({"grid": (0, 4, 6)}, "invalid number"),
        ({"grid": (4, 6)}, "invalid number"),
        ({"start": -1}, "invalid number"),
        ({"digest": "xyz"}, "hexadecimal"),
    ],
)
def test_invalid_images_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(IMAGE, **values)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("images", [(replace(IMAGE, start=4),), (IMAGE, replace(IMAGE, start=1)), (IMAGE, IMAGE)])
def test_images_must_be_in_the_prompt_one_after_the_other(images: tuple[ImageInput, ...]) -> None:
    with pytest.raises(UsageError, match="but the next image or the end is at"):
        replace(REQUEST, images=images)

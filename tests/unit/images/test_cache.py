"""The cache of prepared images."""

from __future__ import annotations

import io
import threading

import pytest
from PIL import Image

from kimi_mlx.errors import ImageError
from kimi_mlx.images.cache import MediaCache

ONE_IMAGE = 4 * 3 * 14 * 14  # bytes of the patches of a picture of up to 28 x 28 pixels


def picture(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_latest_images_are_kept_within_the_limit() -> None:
    cache = MediaCache(max_bytes=3 * ONE_IMAGE)

    def prepared(colour: int) -> object:
        return cache.prepare("image", picture(colour), "x")[0].image

    first, second = prepared(1), prepared(2)
    assert prepared(1) is first
    prepared(3)
    prepared(4)  # evicts 2, which was used before 1
    assert prepared(1) is first
    assert prepared(2) is not second
    assert cache.num_bytes == 3 * ONE_IMAGE


def test_an_image_above_the_limit_is_prepared_but_not_kept() -> None:
    cache = MediaCache(max_bytes=ONE_IMAGE - 1)
    assert cache.prepare("image", picture(1), "x")[0].image.num_tokens == 1
    assert cache.num_bytes == 0


def test_errors_name_the_place_of_each_use() -> None:
    cache = MediaCache()
    for place in ("a", "b"):
        with pytest.raises(ImageError, match=f"`{place}`"):
            cache.prepare("image", b"nothing", place)
        with pytest.raises(ImageError, match=f"`{place}`"):
            cache.prepare("video", picture(1), place)


def test_several_threads() -> None:
    cache = MediaCache(max_bytes=3 * ONE_IMAGE)
    digests: list[tuple[int, str]] = []

    def run() -> None:
        for number in range(60):
            colour = number % 7
            digests.append((colour, cache.prepare("image", picture(colour), "x")[0].image.digest))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(digests) == 240
    assert len(set(digests)) == 7
    assert cache.num_bytes == 3 * ONE_IMAGE

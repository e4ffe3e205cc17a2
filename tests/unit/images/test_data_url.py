"""Data URLs: forms that browsers accept, and errors."""

from __future__ import annotations

import pytest

from kimi_mlx.errors import ImageError
from kimi_mlx.images.data_url import read_data_url, to_data_url, too_large


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,AAEC",
        "data:;base64,AAEC",
        "DATA:image/png; BASE64 ,AAEC",
        "data:image/png;name=a.png;base64,AA\nEC",
        "data:;base64,%41AEC",
        "data:image/png,%00%01%02",
    ],
)
def test_forms_of_data_urls(url: str) -> None:
    assert read_data_url(url, "image") == b"\0\1\2"


@pytest.mark.parametrize("url", ["data:;base64,@", "data:;base64,A", "data:;base64,data:;base64,AAEC"])
def test_broken_base64(url: str) -> None:
    with pytest.raises(ImageError, match="image`: the data is not valid base64"):
        read_data_url(url, "image")


def test_sizes_close_to_the_limit_differ_in_the_message() -> None:
    assert too_large("image", 32_000_001, 32_000_000).reason == "the file has 32000001 bytes, more than 32000000"
    assert too_large("image", 33_000_000, 32_000_000).reason == "the file has 33.0 MB, more than 32.0 MB"


@pytest.mark.parametrize(
    ("begin", "media_type"),
    [
        (b"\x89PNG", "image/png"),
        (b"RIFF\n\0\0\0WEBP", "image/webp"),
        (b"\0\0\0\x18ftypheic", "image/heic"),
        (b"\0\0\0\x18ftypisom", "video/mp4"),
        (b"text", "application/octet-stream"),
    ],
)
def test_a_data_url_has_the_media_type_of_its_contents(begin: bytes, media_type: str) -> None:
    url = to_data_url(begin + b"rest")
    assert url.startswith(f"data:{media_type};base64,")
    assert read_data_url(url, "image") == begin + b"rest"

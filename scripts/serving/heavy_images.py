"""Requests with images that cost a server much work: large, many, broken and hostile files."""

from __future__ import annotations

import base64
import io
import json
import random
from typing import Any

from PIL import Image

from scripts.serving.heavy_bodies import CHAT, COUNT_TOKENS, HeavyRequest


def heavy_images() -> list[HeavyRequest]:
    """Return requests with images, for a model that sees them."""
    large = _file(_noise((2560, 1950)), "PNG")  # 15 MB: 20 MB in base64
    photo = _file(_noise((1600, 1200)), "JPEG")
    small = _file(_noise((64, 64)), "PNG")
    bomb = bytearray(small)
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2  # width and height in the header
    return [
        _request("image: 20 MB", [large]),
        _request("image: 20 MB, twice at once", [large], count=2),
        _request("image: 20 MB, broken", [large[:-100_000]]),
        _request("image: 20 photos", [photo] * 20),
        _request("image: 100 small ones", [small] * 100),
        _request("image: 101 small ones", [small] * 101),
        _request("image: header of 30,000 x 30,000 pixels", [bytes(bomb)]),
        _request("image: 78 megapixels in 76 kB", [_file(Image.new("L", (8_840, 8_840)), "PNG")]),
        _request("image: 40 photos to count", [photo], COUNT_TOKENS, count=40),
    ]


def _noise(size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(1).randbytes(size[0] * size[1] * 3))


def _file(image: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def _request(name: str, files: list[bytes], path: str = CHAT, count: int = 1) -> HeavyRequest:
    make_part = _block if path == COUNT_TOKENS else _part
    content = [{"type": "text", "text": "What is this?"}, *map(make_part, files)]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    return HeavyRequest(name, path, json.dumps(body).encode(), count)


def _part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:;base64,{base64.b64encode(data).decode()}"}}


def _block(data: bytes) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "data": base64.b64encode(data).decode()}}

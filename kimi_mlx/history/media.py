"""Images and videos of stored messages: their contents are stored once, by their SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from kimi_mlx.text.media import KINDS
from kimi_mlx.units import MB, format_bytes

MAX_MEDIA_BYTES = 32 * MB
"""Size of the largest file that is stored: that of the largest image. Longer videos are left out."""

SHA256, NUM_BYTES = "sha256", "num_bytes"


def take_contents(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a message without the contents of its files, and the contents by their SHA-256.

    Args:
        document: message in OpenAI's format; a part with a file has its bytes in the place of a URL.
    """
    contents: dict[str, bytes] = {}
    if not isinstance(document.get("content"), list | tuple):
        return document, contents
    parts = [_take(part, contents) for part in document["content"]]
    return {**document, "content": parts}, contents


def put_contents(document: dict[str, Any], read: Callable[[str], bytes | None]) -> dict[str, Any]:
    """Return a stored message with the contents of its files; a text replaces a file that was not stored.

    Args:
        document: stored message.
        read: function that returns the contents with a SHA-256; None if there are none.
    """
    if not isinstance(document.get("content"), list):
        return document
    return {**document, "content": [_put(part, read) for part in document["content"]]}


def _take(part: Mapping[str, Any], contents: dict[str, bytes]) -> Mapping[str, Any]:
    key = next((key for key, value in part.items() if isinstance(value, bytes)), None)
    if key is None:
        return part
    data = part[key]
    if len(data) > MAX_MEDIA_BYTES:
        return {**part, key: {NUM_BYTES: len(data)}}
    name = hashlib.sha256(data).hexdigest()
    contents[name] = data
    return {**part, key: {SHA256: name}}


def _put(part: dict[str, Any], read: Callable[[str], bytes | None]) -> dict[str, Any]:
    for key, value in part.items():
        if key in KINDS and isinstance(value, dict) and (SHA256 in value or NUM_BYTES in value):
            data = read(value[SHA256]) if SHA256 in value else None
            if data is not None:
                return {**part, key: data}
            size = f" of {format_bytes(value[NUM_BYTES])}" if NUM_BYTES in value else ""
            return {"type": "text", "text": f"[{KINDS[key]}{size}, not stored in the history]"}
    return part

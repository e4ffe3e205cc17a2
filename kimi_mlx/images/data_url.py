"""Data URLs, in which images arrive: `data:image/png;base64,...`."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote, unquote_to_bytes

from kimi_mlx.errors import ImageError
from kimi_mlx.images.limits import DEFAULT_LIMITS
from kimi_mlx.units import format_bytes

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
BASE64 = re.compile(r"; *base64 *$", re.IGNORECASE)
"""End of the header of a data URL in base64; browsers allow the spaces."""
DATA_URL_HINT = "send the file as a data URL: `data:image/png;base64,...`"
SMALLER_HINT = "send a smaller version"

MEDIA_TYPES = (
    (rb"\x89PNG", "image/png"),
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"GIF8", "image/gif"),
    (rb"RIFF....WEBP", "image/webp"),
    (rb"....ftyp(heic|heix|mif1|msf1)", "image/heic"),
    (rb"....ftypavi[fs]", "image/avif"),
    (rb"....ftyp", "video/mp4"),
    (rb"\x1aE\xdf\xa3", "video/webm"),
)
"""Beginnings of files, as patterns, and their media types."""


def read_data_url(url: str, place: str, max_bytes: int = DEFAULT_LIMITS.max_bytes) -> bytes:
    """Return the contents of a data URL. Its media type is ignored, because the contents identify their format.

    Args:
        url: the URL.
        place: location of the URL, for error messages.
        max_bytes: limit of the contents, checked before they are decoded.

    Raises:
        ImageError: the URL has another scheme, is not valid, or is too large.

    Source: RFC 2397, and https://fetch.spec.whatwg.org/#data-url-processor.
    """
    header, comma, data = url.partition(",")
    scheme = SCHEME.match(header)
    if scheme is None or scheme[1].lower() != "data":
        reason = f"`{scheme[0]}` URLs are not read" if scheme else f"{url[:40]!r} is not a URL"
        raise ImageError(place, reason, hint=DATA_URL_HINT)
    if not comma:
        raise ImageError(place, "the data URL has no comma before its data", hint=DATA_URL_HINT)
    is_base64 = BASE64.search(header) is not None
    num_bytes = len(data) * 3 // 4 if is_base64 else len(data)
    if num_bytes > max_bytes + 3:  # 3: padding, which is no content
        raise too_large(place, num_bytes, max_bytes)
    try:
        if not is_base64:
            return unquote_to_bytes(data)
        return base64.b64decode("".join(unquote(data).split()), validate=True)
    except ValueError as error:  # binascii.Error, or characters outside of ASCII
        raise ImageError(place, f"the data is not valid base64: {error}", hint=DATA_URL_HINT) from error


def to_data_url(data: bytes) -> str:
    """Return the contents of an image or a video as a data URL in base64, with the media type of its first bytes."""
    types = (name for pattern, name in MEDIA_TYPES if re.match(pattern, data, re.DOTALL))
    media_type = next(types, "application/octet-stream")
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def too_large(place: str, num_bytes: int, max_bytes: int) -> ImageError:
    """Return the error for a file above the limit."""
    size, limit = format_bytes(num_bytes), format_bytes(max_bytes)
    if size == limit:
        size, limit = f"{num_bytes} bytes", f"{max_bytes}"
    reason = f"the file has {size}, more than {limit}"
    return ImageError(place, reason, hint=SMALLER_HINT)

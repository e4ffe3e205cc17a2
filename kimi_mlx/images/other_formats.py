"""Files that people send as images by mistake, recognised by their first bytes, so that errors can name them."""

from __future__ import annotations

import re
from typing import NamedTuple

AS_PNG = "save it as PNG or JPEG"


class OtherFormat(NamedTuple):
    """A format that is not read as an image.

    Attributes:
        name: name with its article.
        hint: remedy.
    """

    name: str
    hint: str


AVIF = OtherFormat("an AVIF or JPEG XL file", AS_PNG)
VIDEO = OtherFormat("a video", "send it as a video, or a frame of it as PNG or JPEG")
SVG = OtherFormat("an SVG file", AS_PNG)
_OTHERS = [
    (rb"\s*%PDF", OtherFormat("a PDF file", "save its pages as PNG or JPEG")),
    (rb"....ftypavi[fs]|\xff\x0a|\0\0\0\x0cJXL ", AVIF),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", VIDEO),
    (rb"\s*(<\?xml[^<]*)?(<!--.*?-->\s*|<!DOCTYPE svg[^<]*)*<svg", SVG),
    (rb"\s*<((?i:!doctype) )?(?i:html)", OtherFormat("a web page", "download the image itself")),
    (rb"8BPS", OtherFormat("a Photoshop file", AS_PNG)),
    (rb"PK\x03\x04", OtherFormat("an archive or an Office document", "save its images as PNG or JPEG")),
]
_TEXT = OtherFormat("a text file", "send it as text")
_NUM_BYTES = 1024
"""Number of bytes that are looked at."""


def find_other_format(data: bytes) -> OtherFormat | None:
    """Return what a file is that is no image; None if it is not recognised."""
    start = data[:_NUM_BYTES]
    for pattern, other in _OTHERS:
        if re.match(pattern, start, re.DOTALL):
            return other
    text = start.decode("utf-8", errors="ignore")
    is_text = len(text.encode()) > len(start) - 4 and all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in text)
    return _TEXT if text and is_text and len(start) > 6 else None

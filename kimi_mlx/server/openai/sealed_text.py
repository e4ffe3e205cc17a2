"""Sealed texts, which a client keeps for the server without reading them: `encrypted_content` of the Responses API.

A sealed text is compressed, with a checksum, so that a text of another server or a damaged one is recognized. It is not
secret: the same client has received the same text as reasoning, and may write any reasoning into a conversation. So it
needs no key, and any server of kimi-mlx can read it, also after a restart.
"""

from __future__ import annotations

import base64
import binascii
import zlib

PREFIX = "kimi-mlx-1."
MAX_TEXT_BYTES = 8_000_000
"""Maximum size of an unsealed text: more does not fit a context."""


def seal(text: str) -> str:
    """Return a text in its sealed form."""
    data = text.encode(errors="replace")
    packed = zlib.crc32(data).to_bytes(4, "big") + zlib.compress(data)
    return PREFIX + base64.urlsafe_b64encode(packed).decode()


def unseal(sealed: str) -> str | None:
    """Return the text in a sealed form; None if another server has written it, or if it is damaged or too large."""
    if not sealed.startswith(PREFIX):
        return None
    try:
        packed = base64.b64decode(sealed.removeprefix(PREFIX), altchars=b"-_", validate=True)
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(packed[4:], MAX_TEXT_BYTES)
        if not decompressor.eof or zlib.crc32(data) != int.from_bytes(packed[:4], "big"):
            return None
        return data.decode()
    except (binascii.Error, zlib.error, ValueError):
        return None

"""Decoding of compressed request bodies, piece by piece, so that a small body cannot fill the memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from kimi_mlx.server.errors import ApiError

GZIP, RAW, WITH_HEADER = 31, -15, 15
"""Formats of zlib: gzip, deflate without a header, and deflate with zlib's header, which HTTP calls `deflate`."""

ENCODINGS = ("gzip", "deflate")
GZIP_START = b"\x1f"
"""First byte of a gzip member."""

MAX_MEMBERS = 2_000
"""Maximum number of gzip members of a body: tools that write several put 64 kB or more into each."""

MAX_PIECE_BYTES = 1_000_000
"""Maximum size of a decoded piece."""

INVALID_ENCODING = "invalid_encoding"
"""Error code of a compressed body that cannot be decoded."""


def decoder_for(encoding: str) -> Decoder | None:
    """Return the decoder for a value of the `Content-Encoding` header; None if the body is not encoded.

    Raises:
        ApiError: 415, the encoding is not supported.
    """
    names = [name.strip().lower().removeprefix("x-") for name in encoding.split(",")]
    names = [name for name in names if name not in ("", "identity")]
    if not names:
        return None
    if len(names) > 1 or names[0] not in ENCODINGS:
        message = f"`Content-Encoding: {encoding:.60}` is not supported; use {' or '.join(ENCODINGS)}, or none"
        headers = (("accept-encoding", ", ".join(ENCODINGS)),)
        raise ApiError(415, message, "unsupported_encoding", headers=headers)
    return Decoder(names[0])


class Decoder:
    """Decodes one body. One that is encoded with gzip may have several members, and zeros behind them (RFC 1952).

    Args:
        encoding: name of its encoding.
    """

    def __init__(self, encoding: str):
        self._encoding = encoding
        self._zlib = zlib.decompressobj(GZIP) if encoding == "gzip" else None
        self._num_members = 1

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield the pieces of the body in the next part of the encoded data.

        Raises:
            ApiError: 400, the data is invalid.
        """
        if not data:
            return
        if self._zlib is None:
            # some clients omit the header, whose low four bits are 8 for deflate
            self._zlib = zlib.decompressobj(WITH_HEADER if data[0] & 15 == 8 and data[0] >> 4 <= 7 else RAW)
        try:
            is_full = False  # whether the last piece had the maximum size, so that more may be waiting
            while data or is_full:
                if self._zlib.eof and not (data := self._start_member(data)):
                    return
                piece = self._zlib.decompress(data, MAX_PIECE_BYTES)
                data = self._zlib.unused_data if self._zlib.eof else self._zlib.unconsumed_tail
                is_full = len(piece) == MAX_PIECE_BYTES
                yield piece
        except zlib.error as error:
            raise self._invalid(str(error)) from error

    def _start_member(self, data: bytes) -> bytes:
        """Start the next member of a gzip body; return the data without the zeros before it."""
        if self._encoding == "gzip":
            data = data.lstrip(b"\0")
        if not data:
            return data
        if self._encoding != "gzip" or not data.startswith(GZIP_START):
            raise self._invalid("there is data after its end")
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise self._invalid(f"it has more than {MAX_MEMBERS:,} members")
        self._zlib = zlib.decompressobj(GZIP)
        return data

    def finish(self) -> None:
        """Check that the body is complete.

        Raises:
            ApiError: 400, data is missing.
        """
        if self._zlib is None or not self._zlib.eof:
            raise self._invalid("its end is missing")

    def _invalid(self, reason: str) -> ApiError:
        return ApiError(400, f"the body is not valid {self._encoding}: {reason}", INVALID_ENCODING)

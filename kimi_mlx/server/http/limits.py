"""Limits on the size and the duration of request bodies, which may be compressed."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.content_encoding import Decoder, decoder_for
from kimi_mlx.units import format_bytes

BODY_LIMIT_S = 60.0
"""Time limit for receiving a whole body."""

AMBIGUOUS_LENGTH = "invalid_headers"
"""Error code of a request whose headers give the length of its body in two ways."""

DRAIN_S = 5.0
"""Time limit for reading and discarding the rest of a body that is refused. If the connection were closed while the
client is still sending, the client might never read the response."""


class BodyLimitMiddleware:
    """Decodes compressed bodies, and refuses bodies that are too large or arrive too slowly.

    Args:
        app: wrapped application.
        max_bytes: size limit of a body, as it is sent and when it is decoded.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and check its body while it is read."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length and "transfer-encoding" in headers:
            message = "a request must not have both `Content-Length` and `Transfer-Encoding`"
            raise ApiError(400, message, AMBIGUOUS_LENGTH)
        try:
            if length.isdecimal() and int(length) > self._max_bytes:
                raise _too_large(int(length), self._max_bytes)
            decoder = decoder_for(headers.get("content-encoding", ""))
        except ApiError:
            if "expect" not in headers:  # a client that waits for `100 Continue` has not sent anything yet
                await _discard_body(receive)
            raise
        await self._app(scope, _BodyReceiver(receive, decoder, self._max_bytes), send)


class _BodyReceiver:
    """Receives the messages of one request, and decodes and checks its body.

    Args:
        receive: function that returns the next message.
        decoder: decoder of the body, if it is compressed.
        max_bytes: size limit of the body.
    """

    def __init__(self, receive: Receive, decoder: Decoder | None, max_bytes: int):
        self._receive, self._decoder, self._max_bytes = receive, decoder, max_bytes
        self._deadline = time.monotonic() + BODY_LIMIT_S
        self._size = self._decoded_size = 0
        self._is_complete = False

    async def __call__(self) -> Message:
        """Return the next message.

        Raises:
            ApiError: the body is too large or too late, or cannot be decoded.
        """
        if self._is_complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - time.monotonic())
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {BODY_LIMIT_S:.0f} s", "timeout") from error
        self._is_complete = not message.get("more_body", False)
        try:
            return await self._decode(message)
        except ApiError:
            if not self._is_complete:
                await _discard_body(self._receive)
            raise

    async def _decode(self, message: Message) -> Message:
        body: bytes = message.get("body", b"")
        self._size += len(body)
        if self._size > self._max_bytes:
            raise _too_large(self._size, self._max_bytes)
        if self._decoder is None or message["type"] != "http.request":
            return message
        pieces: list[bytes] = []
        for piece in self._decoder.decode(body):
            pieces.append(piece)
            self._decoded_size += len(piece)
            if self._decoded_size > self._max_bytes:
                raise _too_large(self._decoded_size, self._max_bytes)
            await asyncio.sleep(0)  # lets other requests run between the pieces
        if self._is_complete:
            self._decoder.finish()
        return {**message, "body": b"".join(pieces)}


def _too_large(size: int, limit: int) -> ApiError:
    message = f"the body has at least {format_bytes(size)}, but the limit is {format_bytes(limit)}"
    return ApiError(413, message, "request_too_large", hint="--max-body changes the limit")


async def _discard_body(receive: Receive) -> None:
    """Receive the rest of a body, for DRAIN_S at most."""

    async def discard() -> None:
        while (await receive()).get("more_body", False):
            continue

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(discard(), DRAIN_S)

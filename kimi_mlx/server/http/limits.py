"""Limits on the size and the duration of request bodies, which may be compressed."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.content_encoding import decoder_for
from kimi_mlx.units import format_bytes

BODY_LIMIT_S = 60.0
"""Time limit for receiving a whole body."""

AMBIGUOUS_LENGTH = "invalid_headers"
"""Error code of a request whose headers give the length of its body in two ways."""

DRAIN_S = 5.0
"""Time limit for reading and discarding the rest of a body that is too large. If the connection were closed while the
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
        if length.isdecimal() and int(length) > self._max_bytes:
            # a client that waits for `100 Continue` has not sent anything yet
            raise self._too_large(int(length)) if "expect" in headers else await self._drain(int(length), receive)
        decoder = decoder_for(headers.get("content-encoding", ""))
        deadline = time.monotonic() + BODY_LIMIT_S
        size, decoded_size, is_complete = 0, 0, False

        async def counting_receive() -> Message:
            nonlocal size, decoded_size, is_complete
            if is_complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError as error:
                raise ApiError(408, f"the body did not arrive within {BODY_LIMIT_S:.0f} s", "timeout") from error
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self._max_bytes:
                raise self._too_large(size) if is_complete else await self._drain(size, receive)
            if decoder is None or message["type"] != "http.request":
                return message
            pieces: list[bytes] = []
            for piece in decoder.decode(message.get("body", b"")):
                pieces.append(piece)
                decoded_size += len(piece)
                if decoded_size > self._max_bytes:
                    raise self._too_large(decoded_size) if is_complete else await self._drain(decoded_size, receive)
                await asyncio.sleep(0)  # other requests come first
            if is_complete:
                decoder.finish()
            return {**message, "body": b"".join(pieces)}

        await self._app(scope, counting_receive, send)

    async def _drain(self, size: int, receive: Receive) -> ApiError:
        """Discard the rest of a body; return the error when the client has sent all of it, or after DRAIN_S."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard_body(receive), DRAIN_S)
        return self._too_large(size)

    def _too_large(self, size: int) -> ApiError:
        limit = format_bytes(self._max_bytes)
        message = f"the body has at least {format_bytes(size)}, but the limit is {limit}"
        return ApiError(413, message, "request_too_large", hint="--max-body changes the limit")


async def _discard_body(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        continue

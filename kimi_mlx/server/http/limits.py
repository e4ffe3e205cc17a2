"""Bodies that are too large, or do not come."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.errors import ApiError
from kimi_mlx.units import format_bytes

BODY_LIMIT_S = 60.0
"""For a whole body."""

AMBIGUOUS_LENGTH = "invalid_headers"
"""Code of the error where a body's end could be in two places."""

DRAIN_S = 5.0
"""So long the rest of a body that is too large is read and thrown away: who is cut off while sending may never read
the answer."""


class BodyLimitMiddleware:
    """Refuses bodies of more bytes than are allowed, and those that take too long.

    Args:
        app: what is behind it.
        most_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, most_bytes: int):
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose body is counted as it is read."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length and "transfer-encoding" in headers:
            raise ApiError(400, "a body has either a `Content-Length` or a `Transfer-Encoding`", AMBIGUOUS_LENGTH)
        if length.isdecimal() and int(length) > self._most_bytes:
            # who waits for `100 Continue` has not begun to send
            raise self._too_large(int(length)) if "expect" in headers else await self._drained(int(length), receive)
        ends_at = time.monotonic() + BODY_LIMIT_S
        size, is_whole = 0, False

        async def counted() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), ends_at - time.monotonic())
            except asyncio.TimeoutError as error:
                raise ApiError(408, f"the body did not come within {BODY_LIMIT_S:.0f} s", "timeout") from error
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > self._most_bytes:
                raise self._too_large(size) if is_whole else await self._drained(size, receive)
            return message

        await self._app(scope, counted, send)

    async def _drained(self, size: int, receive: Receive) -> ApiError:
        """The error, when the client has said everything or the time for that is over."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drain(receive), DRAIN_S)
        return self._too_large(size)

    def _too_large(self, size: int) -> ApiError:
        limit = format_bytes(self._most_bytes)
        return ApiError(413, f"the body has {format_bytes(size)} or more, allowed are {limit}", "request_too_large")


async def _drain(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        continue

"""Bodies that are too large, or do not come."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.errors import ApiError
from kimi_mlx.units import format_bytes

BODY_LIMIT_S = 60.0
"""For a whole body."""


class BodyLimit:
    """Refuses bodies of more bytes than are allowed, and those that take too long.

    Args:
        app: what is behind it.
        most_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, most_bytes: int):
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose body is counted as it is read."""
        self._check(Headers(scope=scope).get("content-length", ""))
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
                raise self._too_large(size)
            return message

        await self._app(scope, counted, send)

    def _check(self, length: str) -> None:
        if length.isdecimal() and int(length) > self._most_bytes:
            raise self._too_large(int(length))

    def _too_large(self, size: int) -> ApiError:
        limit = format_bytes(self._most_bytes)
        return ApiError(413, f"the body has {format_bytes(size)} or more, allowed are {limit}", "request_too_large")

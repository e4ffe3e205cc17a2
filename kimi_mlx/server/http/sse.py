"""Answers over HTTP: server-sent events, or one object; whoever goes away ends them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kimi_mlx.server.conversation import AnswerEvent, collect
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.access_log import RECORD_KEY, RequestRecord
from kimi_mlx.server.json_response import JsonResponse
from kimi_mlx.server.service import KEEP_ALIVE_INTERVAL_S
from kimi_mlx.server.translation import ApiFormatter, StreamEvent

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client has closed its connection."""


async def respond(
    request: Request, items: AsyncGenerator[AnswerEvent, None], formatter: ApiFormatter, *, is_stream: bool
) -> Response:
    """The answers to a request, as its API says them.

    Args:
        request: whose body has been read.
        items: of the service.
        formatter: of the API.
        is_stream: as events, or as one object.

    Raises:
        ApiError: it cannot be served.
        ClientGoneError: nobody waits for it any more.
    """
    record: RequestRecord = request.scope[RECORD_KEY]
    items = record.watch(items)
    if is_stream:
        first = await while_connected(request.receive, anext(items))
        return EventStream(first, items, formatter)
    return JsonResponse(formatter.full_response(collect(await while_connected(request.receive, _all(items)))))


async def _all(items: AsyncGenerator[AnswerEvent, None]) -> list[AnswerEvent]:
    async with aclosing(items):
        return [item async for item in items]


class EventStream(Response):
    """A stream of events.

    Args:
        first: what the answer begins with: by then it is known to be served.
        rest: what follows.
        formatter: into the API's words.
    """

    media_type = "text/event-stream"

    def __init__(self, first: AnswerEvent, rest: AsyncGenerator[AnswerEvent, None], formatter: ApiFormatter):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest, self._formatter = first, rest, formatter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._write(send, scope[RECORD_KEY]))

    async def _write(self, send: Send, record: RequestRecord) -> None:
        async with aclosing(self._encoded(record)) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _encoded(self, record: RequestRecord) -> AsyncGenerator[bytes, None]:
        """The bytes of the stream; a comment where there was nothing else for some seconds."""
        formatter = self._formatter
        try:
            yield _bytes(*formatter.begin(), *formatter.add(self._first))
            said_at = time.monotonic()
            async for item in self._rest:
                data = _bytes(*formatter.add(item))
                if not data and time.monotonic() - said_at >= KEEP_ALIVE_INTERVAL_S:
                    data = b": keep-alive\n\n"
                if data:
                    yield data
                    said_at = time.monotonic()
            events = formatter.end()
        except ApiError as error:
            record.reason = f"stopped: {error.message}"
            events = formatter.fail(error)
        yield _bytes(*events)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Work until the client goes away; its whole body must have been read.

    Raises:
        ClientGoneError: it went before the work was done.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _bytes(*events: StreamEvent) -> bytes:
    lines = (f"event: {each.name}\ndata: {each.data}\n\n" if each.name else f"data: {each.data}\n\n" for each in events)
    return "".join(lines).encode(errors="replace")

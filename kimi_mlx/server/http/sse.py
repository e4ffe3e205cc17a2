"""HTTP responses with answers: server-sent events or one JSON object. A disconnected client cancels its answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kimi_mlx.server.api_types import AnswerEvent, CompleteAnswer, collect
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.access_log import RECORD_KEY, RequestRecord
from kimi_mlx.server.http.body import JsonResponse
from kimi_mlx.server.service import KEEP_ALIVE_INTERVAL_S

Result = TypeVar("Result")

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Headers of a stream: neither caches nor proxies may hold it back."""


ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
"""Encoder of events: json.dumps would create one for each."""


class ClientDisconnectedError(Exception):
    """The client has closed its connection."""


@dataclass(frozen=True)
class StreamEvent:
    """A server-sent event.

    Args:
        data: value of its `data:` line.
        name: value of its `event:` line, if it has one.
    """

    data: str
    name: str | None = None

    @classmethod
    def from_json(cls, value: Any, name: str | None = None) -> StreamEvent:
        """Return an event with JSON as its data."""
        return cls(ENCODER.encode(value), name)


class ApiFormatter(Protocol):
    """Formats the answers to one request for one API. It does no I/O.

    Attributes:
        notes: sentences about parts of the request that have no effect; a response has them as NOTES_FIELD, if any.
    """

    notes: Sequence[str]

    def begin(self) -> Iterable[StreamEvent]:
        """Return the events at the start of a stream, before any answer has started."""
        ...

    def add(self, event: AnswerEvent) -> Iterable[StreamEvent]:
        """Return the events for an answer event. There may be none: comments keep the stream alive."""
        ...

    def end(self) -> Iterable[StreamEvent]:
        """Return the events at the end of a stream, after the FinishEvents of all answers."""
        ...

    def fail(self, error: ApiError) -> Iterable[StreamEvent]:
        """Return the events that end a stream after an error."""
        ...

    def full_response(self, answers: Sequence[CompleteAnswer]) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        ...


async def respond(
    request: Request, events: AsyncGenerator[AnswerEvent, None], formatter: ApiFormatter, *, is_stream: bool
) -> Response:
    """Return the response to a request.

    Args:
        request: request, whose body has been read.
        events: events of the service.
        formatter: formatter of the API.
        is_stream: whether the response is a stream of events rather than one object.

    Raises:
        ApiError: the request cannot be served.
        ClientDisconnectedError: the client has disconnected.
    """
    record: RequestRecord = request.scope[RECORD_KEY]
    events = record.watch(events)
    if is_stream:
        first = await while_connected(request.receive, anext(events))
        return EventStream(first, events, formatter)
    answers = await while_connected(request.receive, _all(events))
    # in a thread: with log probabilities, an answer has thousands of parts
    return await anyio.to_thread.run_sync(lambda: JsonResponse(formatter.full_response(collect(answers))))


async def _all(events: AsyncGenerator[AnswerEvent, None]) -> list[AnswerEvent]:
    async with aclosing(events):
        return [event async for event in events]


class EventStream(Response):
    """A stream of server-sent events.

    Args:
        first: first event. Waiting for it before the response starts allows an error status instead.
        rest: remaining events.
        formatter: formatter of the API.
    """

    media_type = "text/event-stream"

    def __init__(self, first: AnswerEvent, rest: AsyncGenerator[AnswerEvent, None], formatter: ApiFormatter):
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._first, self._rest, self._formatter = first, rest, formatter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._write(send, scope[RECORD_KEY]))

    async def _write(self, send: Send, record: RequestRecord) -> None:
        async with aclosing(self._encoded(record)) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _encoded(self, record: RequestRecord) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of the stream, with a comment if there has been nothing else for KEEP_ALIVE_INTERVAL_S."""
        formatter = self._formatter
        try:
            yield _encode(*formatter.begin(), *formatter.add(self._first))
            sent_at = time.monotonic()
            async for event in self._rest:
                data = _encode(*formatter.add(event))
                if not data and time.monotonic() - sent_at >= KEEP_ALIVE_INTERVAL_S:
                    data = b": keep-alive\n\n"
                if data:
                    yield data
                    sent_at = time.monotonic()
            last = formatter.end()
        except ApiError as error:
            record.reason = f"stopped: {error.log_text}"
            last = formatter.fail(error)
        yield _encode(*last)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine, and cancel it if the client disconnects. The request's body must have been read before.

    Raises:
        ClientDisconnectedError: the client disconnected before the coroutine was done.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        for task in (working, listening):
            task.cancel()
        with anyio.CancelScope(shield=True):  # at a shutdown, a worker process is ended before the event loop
            await asyncio.gather(working, listening, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _encode(*events: StreamEvent) -> bytes:
    names = (f"event: {event.name}\n" if event.name else "" for event in events)
    text = "".join(f"{name}data: {event.data}\n\n" for name, event in zip(names, events, strict=True))
    return text.encode(errors="replace")

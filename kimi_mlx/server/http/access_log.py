"""One line a request: what was asked, how it went; prompts only if that is wanted."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.conversation import AnswerEvent, DeltaEvent, FinishEvent, Usage, total_usage
from kimi_mlx.server.metrics import Metrics

LOG = logging.getLogger(__name__)

CLIENT_GONE = 499
"""The status, in the log, of a request whose client did not wait for the answer."""

MAX_PATH, MAX_REASON = 200, 100
"""Characters of a path, and of a reason, in the log."""

RECORD_KEY = "kimi_mlx.record"
"""Where the record of a request is in its scope."""


@dataclass
class RequestRecord:
    """What is remembered of a request until it ends.

    Args:
        begun_at: by time.monotonic.
        id: that the client is told.
        status: of the response, once it has begun.
        body: of the request.
        first_s: how long until the first piece of an answer.
        ends: of its answers.
        is_gone: whether the client has not waited for the end.
        reason: why it was refused, or ended before its time.
    """

    begun_at: float = field(default_factory=time.monotonic)
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    status: int | None = None
    body: bytes = b""
    first_s: float | None = None
    ends: list[FinishEvent] = field(default_factory=list[FinishEvent])
    is_gone: bool = False
    reason: str | None = None

    async def watch(self, items: AsyncGenerator[AnswerEvent, None]) -> AsyncGenerator[AnswerEvent, None]:
        """Pass items on."""
        async with aclosing(items):
            async for item in items:
                if isinstance(item, DeltaEvent) and self.first_s is None:
                    self.first_s = time.monotonic() - self.begun_at
                elif isinstance(item, FinishEvent):
                    self.ends.append(item)
                yield item


class AccessLog:
    """Writes the log, and counts requests.

    Args:
        app: what is behind it.
        metrics: where to count.
        routes: that are counted by their paths.
        log_prompts: whether the log shows bodies.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[Route], *, log_prompts: bool):
        self._app, self._metrics, self._routes, self._log_prompts = app, metrics, routes, log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] != "http":
            return
        record = RequestRecord()
        scope[RECORD_KEY] = record

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._close(record, scope)

    def _close(self, record: RequestRecord, scope: Scope) -> None:
        status = CLIENT_GONE if record.is_gone or record.status is None else record.status
        path = scope["path"]
        label = next((route.path_format for route in self._routes if route.path_regex.match(path)), "other")
        self._metrics.requests.labels(label, str(status)).inc()
        client = (scope.get("client") or ("-",))[0]
        LOG.info("%s", _line(record, f"{client} {scope['method']} {_printable(path, MAX_PATH)}", status))
        if self._log_prompts and record.body:
            LOG.info("%s", record.body.decode(errors="replace"))


def _line(record: RequestRecord, what: str, status: int) -> str:
    parts = [f"{what} {status}", f"{time.monotonic() - record.begun_at:.2f} s"]
    if record.first_s is not None:
        parts.append(f"first {record.first_s:.2f} s")
    if record.ends:
        usage: Usage = total_usage(record.ends)
        parts.append(
            f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} new"
        )
    if record.reason is not None:
        parts.append(_printable(record.reason, MAX_REASON))
    return " · ".join(parts)


def _printable(text: str, most: int) -> str:
    """A text as one line of a terminal may show it."""
    return "".join(each if each.isprintable() else "?" for each in text)[:most]

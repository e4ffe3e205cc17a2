"""Access log: one line per request, and with `--log-prompts` its body, without the data of images."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.api_types import AnswerEvent, DeltaEvent, FinishEvent, total_usage
from kimi_mlx.server.metrics import Metrics

LOG = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""Status, in the log, of a request whose client disconnected before the response (as in nginx)."""

MAX_PATH_CHARS = 200
MAX_REASON_CHARS = 300
MAX_URL_HEADER_CHARS = 100

MIN_DATA_CHARS = 200
"""Minimum length of a string that is taken for data and not for text."""

MAX_OTHER_FRACTION = 0.05
"""Fraction of other characters, such as line breaks, in base64; texts have more spaces."""

BASE64_CHARS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_"

CONTROL_CHARS = re.compile(rb"[\x00-\x1f\x7f]+|\xc2[\x80-\x9f]")
"""Control characters in UTF-8, which could end the line of the log or control the terminal."""

REQUEST_ID_HEADERS = ("x-request-id", "request-id")
"""Headers with the request id: OpenAI's and Anthropic's."""

RECORD_KEY = "kimi_mlx.record"
"""Key of a request's RequestRecord in its ASGI scope."""


@dataclass
class RequestRecord:
    """Data of one request for the access log.

    Args:
        started_at: start of the request, by time.monotonic.
        id: request id, sent in REQUEST_ID_HEADERS of the response.
        status: status of the response, once it has started.
        body: body of the request.
        ttft_s: time to the first delta of any answer.
        finishes: FinishEvents of the answers.
        has_disconnected: whether the client disconnected before the end.
        reason: reason for an error, or for an early end.
    """

    started_at: float = field(default_factory=time.monotonic)
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    status: int | None = None
    body: bytes = b""
    ttft_s: float | None = None
    finishes: list[FinishEvent] = field(default_factory=list[FinishEvent])
    has_disconnected: bool = False
    reason: str | None = None

    async def watch(self, events: AsyncGenerator[AnswerEvent, None]) -> AsyncGenerator[AnswerEvent, None]:
        """Yield the events unchanged, and record the time to the first delta and the FinishEvents."""
        async with aclosing(events):
            async for event in events:
                if isinstance(event, DeltaEvent) and self.ttft_s is None:
                    self.ttft_s = time.monotonic() - self.started_at
                elif isinstance(event, FinishEvent):
                    self.finishes.append(event)
                yield event


class AccessLog:
    """Middleware that logs and counts requests.

    Args:
        app: wrapped application.
        metrics: metrics of the server.
        routes: routes that are counted under their own paths; all others are counted as `other`.
        unlogged_paths: paths whose successful requests are counted, but not logged.
        log_prompts: whether request bodies are logged.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: Sequence[Route],
        unlogged_paths: Collection[str],
        *,
        log_prompts: bool,
    ):
        self._app, self._metrics, self._routes, self._log_prompts = app, metrics, routes, log_prompts
        self._unlogged_paths = unlogged_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and log it when it ends."""
        if scope["type"] != "http":
            return
        record = RequestRecord()
        scope[RECORD_KEY] = record

        async def recording_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name in REQUEST_ID_HEADERS:
                    headers[name] = record.id
            await send(message)

        try:
            await self._app(scope, receive, recording_send)
        finally:
            self._write(record, scope)

    def _write(self, record: RequestRecord, scope: Scope) -> None:
        status = CLIENT_CLOSED_REQUEST if record.has_disconnected or record.status is None else record.status
        path = scope["path"]
        label = next((route.path_format for route in self._routes if route.path_regex.match(path)), "other")
        self._metrics.requests.labels(label, str(status)).inc()
        if path in self._unlogged_paths and status < 400:
            return
        client = (scope.get("client") or ("-",))[0]
        LOG.info("%s", _line(record, f"{client} {scope['method']} {_printable(path, MAX_PATH_CHARS)}", status))
        if self._log_prompts and record.body:
            LOG.info("%s", text_without_media(record.body))


def _line(record: RequestRecord, request: str, status: int) -> str:
    parts = [f"{request} {status}", f"{time.monotonic() - record.started_at:.2f} s"]
    if record.ttft_s is not None:
        parts.append(f"TTFT {record.ttft_s:.2f} s")
    if record.finishes:
        usage = total_usage(record.finishes)
        parts.append(
            f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} new"
        )
    if record.reason is not None:
        parts.append(_printable(record.reason, MAX_REASON_CHARS))
    return " · ".join(parts)


def text_without_media(body: bytes) -> str:
    """Return the text of a body on one line, with the sizes of images, videos and other files instead of their data."""
    encoding = json.detect_encoding(body)
    if encoding != "utf-8":
        body = body.decode(encoding, "replace").encode(errors="replace")
    text = b'"'.join(map(_without_data, body.split(b'"')))
    return CONTROL_CHARS.sub(b" ", text).decode(errors="replace")


def _without_data(string: bytes) -> bytes:
    """Return a string of a body, shortened if it is a data URL or base64."""
    if string[:5].lower() == b"data:":
        header, comma, data = string.partition(b",")
        return b"%b%b(%d bytes)" % (header[:MAX_URL_HEADER_CHARS], comma, len(data))
    if len(string) < MIN_DATA_CHARS:
        return string
    num_others = len(string.translate(None, BASE64_CHARS))
    return b"(%d bytes)" % len(string) if num_others < MAX_OTHER_FRACTION * len(string) else string


def _printable(text: str, max_chars: int) -> str:
    """Return a text that is safe to show on one line of a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)[:max_chars]

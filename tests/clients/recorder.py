"""Records what a client sends. The fields of a request become a file, without the client's own texts.

`RECORD=1 scripts/test -m clients tests/clients` writes the files of `requests` anew; the default tests send them to the
server (tests/server/test_recorded_requests.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REQUESTS = Path(__file__).with_name("requests")
MODEL_PATHS = ("/chat/completions", "/responses", "/messages", "/completions")
KEPT_HEADERS = ("anthropic-version", "anthropic-beta", "content-type", "openai-beta", "x-stainless-helper-method")
MAX_WORD = 60
"""Longest text that is kept, if it is one word: names of fields and models, ids."""
MAX_TOOLS = 1
KEPT_TEXTS = (
    *("arguments", "id", "call_id", "tool_call_id", "tool_use_id", "name", "model", "type", "role"),
    *("pattern", "$ref", "$schema"),
)


@dataclass(frozen=True)
class Recorded:
    """A request and the status of its response."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    status: int


@dataclass
class Recorder:
    """Middleware that keeps the requests to the model."""

    requests: list[Recorded] = field(default_factory=list)

    def around(self, app: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        """Return the application with the recorder before it."""

        async def recording(scope: Any, receive: Any, send: Any) -> None:
            parts: list[bytes] = []

            async def receive_part() -> Any:
                message = await receive()
                parts.append(message.get("body", b""))
                return message

            async def send_part(message: Any) -> None:
                if message["type"] == "http.response.start":
                    self._add(scope, b"".join(parts), message["status"])
                await send(message)

            await app(scope, receive_part, send_part)

        return recording

    def _add(self, scope: Any, body: bytes, status: int) -> None:
        if scope["method"] == "POST" and scope["path"].endswith(MODEL_PATHS):
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            self.requests.append(Recorded(scope["path"], headers, json.loads(body), status))


@dataclass(frozen=True)
class ClientServer:
    """A running server, and the requests that it has received.

    Args:
        url: URL of its root.
        recorder: its recorder.
    """

    url: str
    recorder: Recorder

    def check(self, name: str, client: str) -> None:
        """Require that no request was refused; with `RECORD=1` in the environment, write a file with the longest one.

        Args:
            name: name of the file.
            client: client with its version.
        """
        requests = self.recorder.requests
        assert requests
        refused = [(request.path, request.status) for request in requests if request.status >= 400]
        assert not refused
        if os.environ.get("RECORD"):
            (REQUESTS / f"{name}.json").write_text(json.dumps(_record(client, requests), indent=1) + "\n")


def _record(client: str, requests: list[Recorded]) -> dict[str, Any]:
    """Return the last request with the most messages among those that do not refer to earlier ones."""
    complete = [request for request in requests if "item_reference" not in json.dumps(request.body)]
    chosen = max(reversed(complete), key=lambda request: (bool(request.body.get("tools")), _num_messages(request.body)))
    called = json.dumps(chosen.body.get("messages", chosen.body.get("input")))
    headers = {name: value for name, value in chosen.headers.items() if name in KEPT_HEADERS}
    return {"client": client, "path": chosen.path, "headers": headers, "body": _shape(chosen.body, called)}


def _num_messages(body: dict[str, Any]) -> int:
    messages = body.get("messages", body.get("input", ""))
    return len(messages) if isinstance(messages, list) else 1


def _shape(value: Any, called: str, key: str = "") -> Any:
    """Return a value with its fields, but without long texts and most of its tools."""
    if isinstance(value, dict):
        return {name: _shape(item, called, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_shape(item, called, key) for item in (_some_tools(value, called) if key == "tools" else value)]
    if isinstance(value, str) and key not in KEPT_TEXTS:
        is_word = len(value) <= MAX_WORD and len(value.split()) == 1 and "/" not in value
        return value if is_word else "text"
    return value


def _some_tools(tools: list[Any], called: str) -> list[Any]:
    """Return tools of all types, some of each, and those that the recorded conversation calls."""
    counts: dict[str, int] = {}
    kept = list[Any]()
    for tool in tools:
        kind = str(tool.get("type"))
        counts[kind] = counts.get(kind, 0) + 1
        name = tool.get("function", tool).get("name")
        if counts[kind] <= MAX_TOOLS or f'"name": "{name}"' in called:
            kept.append(tool)
    return kept

"""A server that is not ours: fixed answers, written to the connection piece by piece."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """An answer to a request.

    Args:
        body: pieces of the body; a number is a pause in seconds.
        status: status code.
        headers: headers; those of events by default.
        is_cut: whether the connection is cut after the body, in mid-chunk.
    """

    body: Sequence[str | float] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})
    is_cut: bool = False

    @classmethod
    def from_json(cls, value: Any, status: int = 200, **headers: str) -> Reply:
        return cls([json.dumps(value)], status, {"content-type": "application/json", **headers})


def events(*values: Any) -> Reply:
    """Return a stream of events, with the mark of the end."""
    return Reply([*(f"data: {json.dumps(value)}\n\n" for value in values), "data: [DONE]\n\n"])


def delta(finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return a chunk."""
    return {"id": "1", "choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


@dataclass
class ForeignServer:
    """A running server.

    Args:
        url: its address.
        requests: paths and bodies of all requests.
    """

    url: str
    requests: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])

    @property
    def body(self) -> dict[str, Any]:
        """Body of the last request."""
        return self.requests[-1][1]


MODELS = Reply.from_json({"object": "list", "data": [{"id": "other-model", "object": "model", "owned_by": "other"}]})


@contextmanager
def foreign_server(
    chat: Reply | Sequence[Reply] = (), models: Reply = MODELS, context: ssl.SSLContext | None = None, **paths: Reply
) -> Iterator[ForeignServer]:
    """Run a server.

    Args:
        chat: answers to chat completions, in order; the last one is repeated.
        models: answer to GET /v1/models.
        context: TLS, if any.
        paths: answers to other paths below /v1, with `_` for `/`.
    """
    replies = [chat] if isinstance(chat, Reply) else list(chat)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _answer(self, body: Any) -> None:
            running.requests.append((self.path, body))
            path = self.path.removeprefix("/v1/")
            if path == "chat/completions" and replies:
                self._send(replies.pop(0) if len(replies) > 1 else replies[0])
            elif path == "models":
                self._send(models)
            else:
                self._send(paths.get(path.replace("/", "_"), Reply.from_json({"detail": "Not Found"}, 404)))

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.close_connection = True
            try:
                for piece in reply.body:
                    if isinstance(piece, str):
                        data = piece.encode()
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                        self.wfile.flush()
                    else:
                        time.sleep(piece)
                self.wfile.write(b"10\r\nhalf" if reply.is_cut else b"0\r\n\r\n")
            except OSError:  # the client has gone
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "http" if context is None else "https"
        running = ForeignServer(f"{scheme}://localhost:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield running
        finally:
            server.shutdown()

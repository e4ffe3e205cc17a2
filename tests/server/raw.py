"""HTTP requests that client libraries cannot send."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import closing
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Response:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Error in OpenAI's format."""
        return json.loads(self.body)["error"]


def request(
    port: int,
    method: str = "GET",
    path: str = "/v1/models",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Send one request on a connection of its own."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        return Response(response.status, names, response.read())


def chat(port: int, headers: dict[str, str] | None = None, **body: Any) -> Response:
    """Request a chat completion."""
    fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | body
    return request(port, "POST", "/v1/chat/completions", json.dumps(fields).encode(), headers)


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a body; return that of the response."""
    return json.loads(request(port, "POST", path, json.dumps(body).encode()).body)


def begin(port: int, receive_bytes: int | None = None, **body: Any) -> socket.socket:
    """Request a chat completion without reading the response.

    Args:
        port: port of the server.
        receive_bytes: size of the connection's receive buffer; None for the system's.
        body: fields of the request.
    """
    text = json.dumps({"messages": [{"role": "user", "content": "hi"}]} | body).encode()
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(text)}\r\n\r\n"
    connection.sendall(head.encode() + text)
    return connection

"""Clients that disconnect, are slow, or are connected during a shutdown."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from typing import Any

import pytest

from kimi_mlx.server import service
from kimi_mlx.server.http import limits, protocol, sse
from kimi_mlx.session.session import Session
from tests.server import raw
from tests.server.running_server import RunningServer, serving, wait_until

LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Generate an SVG of a pelican riding a bicycle"}],
    "logit_bias": {"1537": -100, "1538": -100},  # the tokens that end an answer
}
CANCELLED = "kimi_mlx_answers_cancelled_total"


def read_until(connection: socket.socket, text: bytes) -> bytes:
    data = b""
    while text not in data:
        more = connection.recv(65536)
        assert more, data
        data += more
    return data


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed the connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_disconnect_cancels_the_answer(running: RunningServer, is_stream: bool) -> None:
    before = running.metric(CANCELLED)
    with closing(raw.begin(running.port, stream=is_stream, n=2, **LONG)) as connection:
        if is_stream:
            read_until(connection, b'"content"')
        else:
            time.sleep(0.3)
        assert running.server.service.running == 2
    running.wait_idle()
    assert running.metric(CANCELLED) == before + 2
    assert raw.chat(running.port).status == 200


def test_the_server_survives_many_disconnects(running: RunningServer) -> None:
    before = running.metric(CANCELLED)
    for _ in range(30):
        raw.begin(running.port, stream=True, **LONG).close()
    assert raw.chat(running.port).status == 200
    running.wait_idle()
    assert running.metric(CANCELLED) >= before
    assert raw.chat(running.port).status == 200


def test_a_stream_without_events_is_kept_alive(running: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "KEEP_ALIVE_INTERVAL_S", 0.02)
    monkeypatch.setattr(sse, "KEEP_ALIVE_INTERVAL_S", 0.02)
    prompt = [{"role": "user", "content": "word " * 500}]
    with closing(raw.begin(running.port, stream=True, messages=prompt, max_tokens=2)) as connection:
        data = read_until(connection, b"[DONE]")
    assert b": keep-alive\n\n" in data
    assert data.index(b": keep-alive") < data.index(b"data: ")


def test_time_limit_for_headers(running: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADERS_LIMIT_S", 0.2)
    with closing(socket.create_connection(("127.0.0.1", running.port), timeout=5)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: local")
        assert is_closed(connection)


def test_time_limit_for_bodies(running: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_LIMIT_S", 0.2)
    with closing(socket.create_connection(("127.0.0.1", running.port), timeout=5)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_time_limit_for_clients_that_do_not_read(running: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "WRITE_LIMIT_S", 0.3)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    with closing(connection):
        connection.connect(("127.0.0.1", running.port))
        connection.settimeout(10)
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 1000)
        own = connection.getsockname()
        peers = lambda: {getattr(connection, "client", None) for connection in running.server.server_state.connections}  # noqa: E731
        wait_until(lambda: own in peers())
        wait_until(lambda: own not in peers())
    assert raw.chat(running.port).status == 200


def test_malformed_requests_are_answered(running: RunningServer) -> None:
    for data, status in ((b"\x00\xff\r\n\r\n", b"400"), (b"GET /x HTTP/1.1\r\nhost: localhost\r\n\r\n", b"404")):
        with closing(socket.create_connection(("127.0.0.1", running.port), timeout=5)) as connection:
            connection.sendall(data)
            assert status in connection.recv(1000).partition(b"\r\n")[0]
    for body in (b"", b"{", b"[]", b"null", b'{"messages": 3}', b"\xff", b"[" * 100_000, b'{"messages": NaN}'):
        response = raw.request(running.port, "POST", "/v1/chat/completions", body)
        assert response.status == 400, body[:20]
        assert response.error["message"]
    surrogate = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}'
    assert raw.request(running.port, "POST", "/v1/chat/completions", surrogate).status in (200, 400)


def test_shutdown_ends_running_streams(session: Session) -> None:
    with serving(session) as server:
        connection = raw.begin(server.port, stream=True, **LONG)
        read_until(connection, b'"content"')
    with closing(connection):
        data = read_until(connection, b"[DONE]")
        lines = [line for line in data.splitlines() if line.startswith(b"data: {")]
        assert json.loads(lines[-1].removeprefix(b"data: "))["error"]["code"] == "stopping"


@pytest.mark.slow
@pytest.mark.parametrize("body", [b'{"prompt": [%s]}' % b",".join([b"1"] * 1_000_000), b'{"prompt": '])
def test_shutdown_ends_requests_that_are_received_or_prepared(session: Session, body: bytes) -> None:
    with closing(socket.socket()) as connection, serving(session) as server:
        connection.settimeout(10)
        connection.connect(("127.0.0.1", server.port))
        length = len(body) if len(body) > 100 else 1000
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % length)
        connection.sendall(body)
        wait_until(lambda: server.server.service.is_receiving)
        server.server.should_exit = True
        started = time.monotonic()
        response = read_until(connection, b"}}")
        assert response.startswith(b"HTTP/1.1 503")
        assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["message"] == "the server is shutting down"
    assert time.monotonic() - started < 5  # the time for running requests is 10 s


def test_health_and_metrics(running: RunningServer) -> None:
    response = raw.request(running.port, path="/health")
    assert (response.status, json.loads(response.body)["status"]) == (200, "ok")
    raw.chat(running.port)
    wait_until(lambda: running.metric('kimi_mlx_requests_total{route="/v1/chat/completions",status="200"}') >= 1)
    text = raw.request(running.port, path="/metrics").body.decode()
    assert 'kimi_mlx_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "kimi_mlx_ttft_seconds_bucket" in text
    assert "kimi_mlx_up 1.0" in text


def test_paths_and_methods(running: RunningServer) -> None:
    assert raw.request(running.port, path="/v1/nowhere").status == 404
    response = raw.request(running.port, path="/v1/chat/completions")
    assert (response.status, response.headers["allow"]) == (405, "POST")
    assert response.headers["x-request-id"].startswith("req_")

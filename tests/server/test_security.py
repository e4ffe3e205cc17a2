"""Who may ask, and what is refused before anything is done with it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.server.http.security import Security, host_name, is_loopback
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.session import Session
from tests.server import raw
from tests.server.running_server import RunningServer, serving

KEYS = ("first-key", "second-key")
PAGE = "https://example.org"


@pytest.fixture(scope="module")
def guarded(session: Session) -> Iterator[RunningServer]:
    """With keys, a name and a page that may ask."""
    security = Security("0.0.0.0", KEYS, ("kimi.test",), (PAGE,))
    with serving(session, ServingOptions(security, max_body_bytes=2000)) as server:
        yield server


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1", "127.0.0.1:1", "[::1]:80", "LOCALHOST"])
def test_own_names_are_answered(running: RunningServer, host: str) -> None:
    assert raw.request(running.port, headers={"host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "192.168.1.7", "a@localhost", "localhost:x", ""]
)
def test_foreign_names_are_not(running: RunningServer, host: str) -> None:
    response = raw.request(running.port, headers={"host": host})
    assert (response.status, response.error["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "file://"])
def test_pages_of_other_sites_are_not(running: RunningServer, origin: str) -> None:
    response = raw.chat(running.port, {"origin": origin})
    assert (response.status, response.error["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in response.headers


def test_own_pages_are(running: RunningServer) -> None:
    host = f"127.0.0.1:{running.port}"
    assert raw.request(running.port, headers={"host": host, "origin": f"http://{host}"}).status == 200


def test_a_preflight_is_refused_without_cors(running: RunningServer) -> None:
    headers = {"origin": PAGE, "access-control-request-method": "POST"}
    response = raw.request(running.port, "OPTIONS", "/v1/chat/completions", headers=headers)
    assert response.status == 403
    assert "access-control-allow-origin" not in response.headers


def test_a_named_page_may_ask(guarded: RunningServer) -> None:
    headers = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    response = raw.request(guarded.port, "OPTIONS", "/v1/chat/completions", headers=headers)
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    foreign = raw.request(guarded.port, "OPTIONS", "/v1/models", headers=headers | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in foreign.headers
    assert (foreign.status, "--cors-origin" in foreign.error["message"]) == (403, True)
    refused = raw.chat(guarded.port, {"origin": PAGE})
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("key", KEYS)
def test_keys_open(guarded: RunningServer, key: str) -> None:
    for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"authorization": f"bearer  {key}"}):
        assert raw.request(guarded.port, headers=headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer "},
        {"authorization": "Basic first-key"},
        {"x-api-key": "first-key, second-key"},
        {"x-api-key": "\xfc"},
    ],
)
def test_nothing_else_does(guarded: RunningServer, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        response = raw.request(guarded.port, path=path, headers=headers)
        assert (response.status, response.error["code"]) == (401, "invalid_api_key")
    assert raw.request(guarded.port, path="/health").status == 200


def test_addresses_and_given_names_are_ours_if_others_can_reach_us(guarded: RunningServer) -> None:
    key = {"x-api-key": KEYS[0]}
    for host, status in (("192.168.1.7:80", 200), ("kimi.test", 200), ("[fe80::1]", 200), ("evil.example", 403)):
        assert raw.request(guarded.port, headers=key | {"host": host}).status == status


def test_large_bodies_are_refused(guarded: RunningServer) -> None:
    key = {"x-api-key": KEYS[0]}
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
    told = raw.request(guarded.port, "POST", "/v1/chat/completions", body, key)
    assert (told.status, told.error["code"], told.headers["connection"]) == (413, "request_too_large", "close")
    chunked = key | {"transfer-encoding": "chunked"}
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [body[:1500], body[1500:]]) + b"0\r\n\r\n"
    assert raw.request(guarded.port, "POST", "/v1/chat/completions", body, chunked).status == 413


def test_who_sends_a_large_body_first_can_read_the_refusal(guarded: RunningServer) -> None:
    body = b"x" * 8_000_000
    head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEYS[0]}\r\ncontent-length: {len(body)}\r\n"
    with closing(socket.create_connection(("127.0.0.1", guarded.port), timeout=10)) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        assert b" 413 " in connection.recv(100)
    with closing(socket.create_connection(("127.0.0.1", guarded.port), timeout=2)) as connection:
        connection.sendall(head.encode() + b"expect: 100-continue\r\n\r\n")
        assert b" 413 " in connection.recv(100)  # at once


def test_a_body_has_one_length(running: RunningServer) -> None:
    headers = {"content-length": "5", "transfer-encoding": "chunked"}
    told = raw.request(running.port, "POST", "/v1/completions", b"0\r\n\r\n", headers)
    assert (told.status, told.error["code"], told.headers["connection"]) == (400, "invalid_headers", "close")


def test_no_path_or_repository_of_a_request_is_looked_at(running: RunningServer, tmp_path: Path) -> None:
    for name in (str(tmp_path), "../kimi-mini", "moonshotai/Kimi-K2-Instruct", "/etc/passwd"):
        assert raw.chat(running.port, model=name).error["code"] == "model_not_found"
    template = "{{ ''.__class__.__mro__ }}{% include '/etc/passwd' %}"
    answer = raw.chat(running.port, messages=[{"role": "user", "content": template}], chat_template=template)
    assert answer.status == 200


def test_names_in_host_headers() -> None:
    assert [host_name(each) for each in ("a", "A:1", "[::1]:2", "a/b", "a:b", "[::1")] == [
        "a", "a", "::1", None, None, None
    ]  # fmt: skip
    assert [is_loopback(each) for each in ("localhost", "127.8.0.1", "::1", "0.0.0.0", "kimi.test")] == [
        True, True, True, False, False
    ]  # fmt: skip

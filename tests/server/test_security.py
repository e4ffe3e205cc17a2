"""Access control: host names, origins, keys, and limits on bodies."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.server.http.content_encoding import MAX_PIECE_BYTES, decoder_for
from kimi_mlx.server.http.security import Security, host_name, is_loopback
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.session import Session
from tests.server import raw
from tests.server.running_server import RunningServer, serving, wait_until

KEYS = ("first-key", "second-key")
PAGE = "https://example.org"


@pytest.fixture(scope="module")
def protected(session: Session) -> Iterator[RunningServer]:
    """Run a server with API keys, an additional host name and an allowed origin."""
    security = Security("0.0.0.0", KEYS, ("kimi.test",), (PAGE,))
    with serving(session, ServingOptions(security, max_body_bytes=2000)) as server:
        yield server


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1", "127.0.0.1:1", "[::1]:80", "LOCALHOST"])
def test_own_host_names_are_allowed(running: RunningServer, host: str) -> None:
    assert raw.request(running.port, headers={"host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "192.168.1.7", "a@localhost", "localhost:x", ""]
)
def test_other_host_names_are_refused(running: RunningServer, host: str) -> None:
    response = raw.request(running.port, headers={"host": host})
    assert (response.status, response.error["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "file://"])
def test_other_origins_are_refused(running: RunningServer, origin: str) -> None:
    response = raw.chat(running.port, {"origin": origin})
    assert (response.status, response.error["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in response.headers


def test_the_own_origin_is_allowed(running: RunningServer) -> None:
    host = f"127.0.0.1:{running.port}"
    assert raw.request(running.port, headers={"host": host, "origin": f"http://{host}"}).status == 200


def test_a_preflight_request_is_refused_without_cors(running: RunningServer) -> None:
    headers = {"origin": PAGE, "access-control-request-method": "POST"}
    response = raw.request(running.port, "OPTIONS", "/v1/chat/completions", headers=headers)
    assert response.status == 403
    assert "access-control-allow-origin" not in response.headers


def test_an_allowed_origin(protected: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    headers = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    response = raw.request(protected.port, "OPTIONS", "/v1/chat/completions", headers=headers)
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    other = raw.request(protected.port, "OPTIONS", "/v1/models", headers=headers | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert (other.status, other.error["message"]) == (403, "the origin `https://evil.example` is not allowed")
    # advice for the operator is in the log
    wait_until(lambda: "--cors-origin ORIGIN" in caplog.text)
    refused = raw.chat(protected.port, {"origin": PAGE})
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("key", KEYS)
def test_valid_keys(protected: RunningServer, key: str) -> None:
    for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"authorization": f"bearer  {key}"}):
        assert raw.request(protected.port, headers=headers).status == 200


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
def test_invalid_keys(protected: RunningServer, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        response = raw.request(protected.port, path=path, headers=headers)
        assert (response.status, response.error["code"]) == (401, "invalid_api_key")
    assert raw.request(protected.port, path="/health").status == 200


def test_addresses_and_additional_names_are_allowed_on_a_public_server(protected: RunningServer) -> None:
    key = {"x-api-key": KEYS[0]}
    for host, status in (("192.168.1.7:80", 200), ("kimi.test", 200), ("[fe80::1]", 200), ("evil.example", 403)):
        assert raw.request(protected.port, headers=key | {"host": host}).status == status


def test_large_bodies_are_refused(protected: RunningServer) -> None:
    key = {"x-api-key": KEYS[0]}
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
    response = raw.request(protected.port, "POST", "/v1/chat/completions", body, key)
    assert (response.status, response.error["code"], response.headers["connection"]) == (
        413,
        "request_too_large",
        "close",
    )
    chunked = key | {"transfer-encoding": "chunked"}
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [body[:1500], body[1500:]]) + b"0\r\n\r\n"
    assert raw.request(protected.port, "POST", "/v1/chat/completions", body, chunked).status == 413


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": lambda data: zlib.compress(data)[2:-4],  # without zlib's header and checksum
    "identity": bytes,
    "identity, gzip": lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]) + bytes(9),
}


@pytest.mark.parametrize("encoding", ENCODERS)
def test_compressed_bodies(running: RunningServer, encoding: str) -> None:
    text = json.dumps({"messages": [{"role": "user", "content": "Hello, " * 1000}]}).encode()
    path = "/v1/messages/count_tokens"
    plain = raw.request(running.port, "POST", path, text)
    response = raw.request(running.port, "POST", path, ENCODERS[encoding](text), {"content-encoding": encoding})
    assert (plain.status, response.status, response.body) == (200, 200, plain.body)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_invalid_compressed_bodies_are_refused(running: RunningServer, encoding: str) -> None:
    whole = ENCODERS[encoding](b'{"messages": []}')
    for body, problem in (
        (whole[:-1], "its end is missing"),
        (b"", "its end is missing"),
        (whole + b"x", "there is data after its end"),
        (whole[:9] + bytes(9), "Error -3"),
        (whole * 2_001, "more than 2,000 members" if encoding == "gzip" else "there is data after its end"),
    ):
        response = raw.request(running.port, "POST", "/v1/completions", body, {"content-encoding": encoding})
        assert (response.status, response.error["code"]) == (400, "invalid_encoding")
        assert problem in response.error["message"]


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_other_encodings_are_refused(running: RunningServer, encoding: str) -> None:
    response = raw.request(running.port, "POST", "/v1/messages", b"{}", {"content-encoding": encoding})
    error = json.loads(response.body)["error"]
    assert (response.status, response.headers["accept-encoding"]) == (415, "gzip, deflate")
    assert error["message"] == f"`Content-Encoding: {encoding}` is not supported; use gzip or deflate, or none"


def test_the_limit_of_a_body_counts_what_is_decoded(session: Session) -> None:
    with serving(session, ServingOptions(max_body_bytes=20_000)) as server:
        for encoding in ("gzip", "deflate"):
            body = ENCODERS[encoding](b" " * 8_000_000)
            assert len(body) < 20_000
            response = raw.request(server.port, "POST", "/v1/completions", body, {"content-encoding": encoding})
            assert (response.status, response.error["code"]) == (413, "request_too_large")


def test_compressed_bodies_are_decoded_in_pieces() -> None:
    text = bytes(range(256)) * 20_000
    for encoding in ("gzip", "deflate", "identity, gzip"):
        encoded = ENCODERS[encoding](text)
        for size in (7, 1000, len(encoded)):
            decoder = decoder_for(encoding)
            assert decoder is not None
            parts = [encoded[at : at + size] for at in range(0, len(encoded), size)]
            pieces = [piece for part in parts for piece in decoder.decode(part)]
            decoder.finish()
            assert b"".join(pieces) == text
            assert max(map(len, pieces)) <= MAX_PIECE_BYTES


def test_a_client_that_sends_a_large_body_can_read_the_error(protected: RunningServer) -> None:
    body = b"x" * 8_000_000
    head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEYS[0]}\r\ncontent-length: {len(body)}\r\n"
    with closing(socket.create_connection(("127.0.0.1", protected.port), timeout=10)) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        assert b" 413 " in connection.recv(100)
    with closing(socket.create_connection(("127.0.0.1", protected.port), timeout=2)) as connection:
        connection.sendall(head.encode() + b"expect: 100-continue\r\n\r\n")
        assert b" 413 " in connection.recv(100)  # at once


@pytest.mark.parametrize(("encoding", "status"), [("br", 415), ("gzip", 400)])
def test_a_client_that_sends_a_large_body_in_an_invalid_encoding_can_read_the_error(
    running: RunningServer, encoding: str, status: int
) -> None:
    body = b"x" * 8_000_000
    response = raw.request(running.port, "POST", "/v1/messages", body, {"content-encoding": encoding})
    assert (response.status, response.headers["connection"]) == (status, "close")


def test_a_body_with_two_lengths_is_refused(running: RunningServer) -> None:
    headers = {"content-length": "5", "transfer-encoding": "chunked"}
    response = raw.request(running.port, "POST", "/v1/completions", b"0\r\n\r\n", headers)
    assert (response.status, response.error["code"], response.headers["connection"]) == (
        400,
        "invalid_headers",
        "close",
    )


def test_requests_cannot_name_files_or_repositories(running: RunningServer, tmp_path: Path) -> None:
    for name in (str(tmp_path), "../kimi-mini", "moonshotai/Kimi-K2-Instruct", "/etc/passwd"):
        assert raw.chat(running.port, model=name).error["code"] == "model_not_found"
    template = "{{ ''.__class__.__mro__ }}{% include '/etc/passwd' %}"
    assert raw.chat(running.port, messages=[{"role": "user", "content": template}]).status == 200
    assert raw.chat(running.port, chat_template=template).error["param"] == "chat_template"


def test_host_headers() -> None:
    assert [host_name(header) for header in ("a", "A:1", "[::1]:2", "a/b", "a:b", "[::1")] == [
        "a", "a", "::1", None, None, None
    ]  # fmt: skip
    assert [is_loopback(host) for host in ("localhost", "127.8.0.1", "::1", "0.0.0.0", "kimi.test")] == [
        True, True, True, False, False
    ]  # fmt: skip

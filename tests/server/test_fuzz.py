"""Fuzzing with generated bodies and random bytes: no status 500, no hang, and the engine stays alive."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.session.session import Session
from tests.fakes import KIMI_MINI, FixedSession
from tests.server import raw
from tests.server.running_server import RunningServer, serving

# a body with valid types may still be refused, such as a tool result without a call
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.sweep
@pytest.mark.parametrize("model", ["kimi-mini", "kimi-mini-vl"])
def test_bodies_generated_from_the_openapi_document(session: Session, model: str, tmp_path: Path) -> None:
    folder = KIMI_MINI.with_name(model)
    answering = session if folder == KIMI_MINI else FixedSession([5])
    with serving(answering, context_tokens=100, folder=folder) as server:
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json"]
        options = ["--checks", CHECKS, "--max-examples", "20", "--request-timeout", "60", "--seed", "1"]
        result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, timeout=600)
        assert result.returncode == 0, result.stdout[-5000:]
        assert_alive(server)


@pytest.mark.slow
def test_random_bytes(running: RunningServer) -> None:
    rng = random.Random(1)
    whole = b'POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 60\r\n\r\n{"messages": []}'
    for _ in range(200):
        data = bytearray(whole * rng.randint(1, 2))
        for _ in range(rng.randint(0, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with closing(socket.create_connection(("127.0.0.1", running.port), timeout=5)) as connection:
            connection.sendall(data[: rng.randint(1, len(data))])
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
            assert b" 500 " not in answer.partition(b"\r\n")[0]
    assert_alive(running)


def assert_alive(server: RunningServer) -> None:
    server.wait_idle()
    assert raw.request(server.port, path="/health").status == 200
    assert raw.chat(server.port).status == 200

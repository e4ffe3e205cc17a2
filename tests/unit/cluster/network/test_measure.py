"""The measuring program over loopback."""

from __future__ import annotations

import ast
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kimi_mlx.cluster.network import measure as module
from kimi_mlx.cluster.network.links import parse_speed
from kimi_mlx.cluster.network.measure import MeasureError, command, measure, serve

SECRET = "s3cret 'quoted'"


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BULK_S", 0.1)
    monkeypatch.setattr(module, "HANDSHAKE_LIMIT_S", 0.3)


@contextmanager
def listening(limit_s: float = 5.0) -> Iterator[tuple[int, list[BaseException]]]:
    """Run a listener in a thread; yield its port and a list that gets its error."""
    ports: list[int] = []
    errors: list[BaseException] = []
    is_ready = threading.Event()

    def on_listening(port: int) -> None:
        ports.append(port)
        is_ready.set()

    def run() -> None:
        try:
            serve("127.0.0.1", 0, SECRET, limit_s, on_listening)
        except (MeasureError, OSError) as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert is_ready.wait(5)
    yield ports[0], errors
    thread.join(limit_s + 2)
    assert not thread.is_alive()


def test_loopback_is_measured() -> None:
    with listening() as (port, errors):
        measured = measure("127.0.0.1", port, SECRET, 5)
    assert not errors
    assert 0 < measured["round_trip_s"] < 0.1
    assert measured["bytes_per_s"] > 1e6
    assert 1 <= measured["messages"] <= module.SMALL_COUNT
    assert measured["bytes"] % module.BLOCK_BYTES == 0


def test_wrong_secret_is_refused_and_the_next_client_is_served() -> None:
    with listening() as (port, errors):
        with pytest.raises(MeasureError, match="another secret"):
            measure("127.0.0.1", port, "wrong", 5)
        with socket.create_connection(("127.0.0.1", port)) as mute:  # sends nothing until the handshake times out
            assert measure("127.0.0.1", port, SECRET, 5)["bytes"]
            mute.close()
    assert not errors


def test_listener_without_the_secret_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(bytes(module.NONCE_BYTES))
                connection.recv(1000)
                connection.sendall(bytes(module.PROOF_BYTES))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MeasureError, match="does not know the secret"):
            measure("127.0.0.1", server.getsockname()[1], SECRET, 5)
        thread.join(5)


def test_listener_without_a_client_times_out() -> None:
    start = time.monotonic()
    with listening(limit_s=0.3) as (_, errors):
        pass
    assert time.monotonic() - start < 8
    assert isinstance(errors[0], TimeoutError)


def test_client_without_an_answer_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            measure("127.0.0.1", mute.getsockname()[1], SECRET, 0.3)
        assert time.monotonic() - start < 8
        port = mute.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        measure("127.0.0.1", port, SECRET, 1)


def test_listener_fails_when_the_client_disconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(connection: socket.socket, deadline: float) -> list[float]:
        raise MeasureError("enough")

    monkeypatch.setattr(module, "_round_trips", fail)
    with listening() as (port, errors), pytest.raises(MeasureError, match="enough"):
        measure("127.0.0.1", port, SECRET, 5)
    assert "closed the connection" in str(errors[0])


def start(*arguments: str | int) -> subprocess.Popen[str]:
    """Start the program as on a host without kimi-mlx: passed with `-c`, the secret on standard input."""
    python, *options = command(sys.executable, *arguments)  # pyright: ignore[reportArgumentType]
    options = [each.replace("BULK_S = 1.0", "BULK_S = 0.1") for each in options]
    process = subprocess.Popen(
        [python, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", bufsize=1
    )
    assert process.stdin is not None
    process.stdin.write(f"{SECRET}\n")
    return process


def read_message(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_program_needs_only_python() -> None:
    with start("serve", "127.0.0.1") as server:
        listening = read_message(server)
        with start("measure", "127.0.0.1", int(str(listening["port"]))) as client:
            measured = read_message(client)
            assert client.wait(10) == 0
        assert server.wait(10) == 0
    assert (listening["kind"], measured["kind"]) == ("listening", "measured")
    assert parse_speed(measured).bytes_per_s > 1e6
    assert SECRET not in " ".join(command("python3", "serve", "127.0.0.1"))


def test_program_exits_when_its_input_ends() -> None:
    with start("serve", "127.0.0.1") as server:
        read_message(server)
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(5) == 1


def run(*arguments: str, secret: str = SECRET) -> tuple[int, dict[str, object]]:
    with subprocess.Popen(
        [sys.executable, module.__file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(f"{secret}\n")
        process.stdin.flush()
        message = read_message(process)
        return process.wait(20), message


def test_error_is_a_json_line_and_an_exit_code() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = str(mute.getsockname()[1])
        code, printed = run("measure", "--address", "127.0.0.1", "--port", port, "--limit", "0.3")
    assert (code, printed) == (1, {"kind": "error", "error": "no answer within 0.3 s"})
    code, printed = run("measure", "--address", "127.0.0.1", "--port", port)
    assert "refused" in str(printed["error"])
    code, printed = run("serve", "--address", "127.0.0.1", secret="")
    assert (code, printed) == (1, {"kind": "error", "error": "no secret on standard input"})
    code, printed = run("serve", "--address", "203.0.113.1")
    assert code == 1
    assert "assign" in str(printed["error"])


def test_program_exits_at_its_limit_with_open_input() -> None:
    arguments = [sys.executable, module.__file__, "serve", "--address", "127.0.0.1", "--limit", "0.2"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE) as process:
        assert process.wait(20) == 1


def test_program_runs_with_python_3_8_and_the_standard_library() -> None:
    source = Path(module.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    modules = [each.module or "" for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)]
    modules += [name.name for each in ast.walk(tree) if isinstance(each, ast.Import) for name in each.names]
    assert {module.split(".")[0] for module in modules} <= sys.stdlib_module_names
    assert source.isascii()

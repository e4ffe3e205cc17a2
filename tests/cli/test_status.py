"""`kimi-mlx status`: servers of this machine and others, once and every second."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from tests.fakes import FixedSession
from tests.server.running_server import RunningServer, serving
from tests.terminal import COMMAND, CTRL_C, Terminal


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(FixedSession([5])) as running:
        yield running


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kimi_mlx", "status", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment or None)


def test_shows_model_and_ranks(server: RunningServer) -> None:
    done = run(server.url)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("kimi-mini", server.url, "running", "one process on", "0 running, 0 waiting", "the whole model"):
        assert text in done.stdout


def test_json_is_the_document_of_the_server(server: RunningServer) -> None:
    assert json.loads(run(server.url, "--json").stdout)["model"] == "kimi-mini"


def test_watch_follows_the_server_and_ends_with_ctrl_c(server: RunningServer) -> None:
    terminal = Terminal(COMMAND, "status", server.url, "--watch")
    try:
        terminal.expect("running")
        terminal.expect("versions")
        terminal.expect("versions")
        terminal.send(CTRL_C)
        assert terminal.wait() == 130
        assert terminal.has_old_modes()
        assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l")  # the cursor is shown again
    finally:
        terminal.close()


def test_errors_say_what_to_type(server: RunningServer, tmp_path: Path) -> None:
    gone = run(f"http://127.0.0.1:{_unused_port()}")
    assert gone.returncode == 1
    assert "connection refused" in gone.stderr
    none = run(XDG_STATE_HOME=str(tmp_path), PATH="/usr/bin", HOME=str(tmp_path))
    assert none.returncode == 1
    assert "no server of yours is running" in none.stderr
    assert "kimi-mlx serve" in none.stderr


@pytest.mark.slow
def test_a_server_with_a_key_wants_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with serving(FixedSession([5]), ServingOptions(Security(keys=("secret",)))) as running:
        assert run(running.url).returncode == 1
        assert run(running.url, "--api-key-file", str(keys)).returncode == 0


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

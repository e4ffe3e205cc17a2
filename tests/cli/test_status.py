"""`kimi-mlx status`: servers of this machine and others, once and every second."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from tests.command import call
from tests.fakes import FixedSession
from tests.server.running_server import RunningServer, serving
from tests.terminal import COMMAND, CTRL_C, Terminal


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(FixedSession([5])) as running:
        yield running


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return call("status", *arguments, variables=variables)


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


class _Answering:
    """A server that is not ours, or of another version: all paths return the current document."""

    def __init__(self, document: object):
        self.document = document
        answering = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(answering.document).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> _Answering:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


OURS = {"model": "m", "versions": {"kimi-mlx": "9"}}
ANSWER = {"state": "decode", "age_s": 1, "prompt_tokens": 2, "processed_tokens": 2, "generated_tokens": 3}


@pytest.mark.parametrize("option", ["--watch", "--json"])
def test_foreign_documents_are_refused(option: str) -> None:
    with _Answering({"model": "other", "answers": [ANSWER] * 500}) as foreign:
        done = run(foreign.url, option)
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert "does not answer with a status" in output
    assert len(output.splitlines()) < 5


def test_many_answers_do_not_fill_the_screen() -> None:
    with _Answering(OURS | {"answers": [ANSWER] * 500}) as busy:
        lines = run(busy.url).stdout.splitlines()
    assert len(lines) < 40
    assert lines[-1] == "and 480 more"


def test_drafts_say_what_was_accepted_and_why_they_are_off() -> None:
    drafts = {"drafted_tokens": 40, "accepted_tokens": 30, "off_reason": "drafts off: too slow"}
    with _Answering(OURS | {"drafts": drafts}) as drafting:
        assert "drafts off: too slow; 75% of 40 draft tokens accepted" in run(drafting.url).stdout


def test_experts_on_the_disk_have_a_line() -> None:
    experts = {"hits": 3, "misses": 1, "bytes_read": 2000, "wait_seconds": 1.5, "guesses": 4, "guesses_right": 2}
    rank = {"rank": 0, "host": "h", "experts": experts | {"kept_experts": 5, "num_experts": 20}}
    with _Answering(OURS | {"ranks": [rank]}) as streaming:
        text = " ".join(run(streaming.url).stdout.split())
    assert "5 of 20 kept in memory; hit rate 75%, 2.0 kB read" in text
    assert "50% of guesses right" in text


@pytest.mark.slow
def test_watch_continues_after_an_unreadable_document() -> None:
    with _Answering(OURS) as other:
        terminal = Terminal(COMMAND, "status", other.url, "--watch")
        try:
            terminal.expect("running")
            other.document = OURS | {"answers": [{"state": "new"}]}
            terminal.expect("not answering")
            terminal.expect("cannot be read")
            other.document = {"object": "list"}
            terminal.expect("does not answer with a status")
            other.document = OURS | {"model": "newer"}
            terminal.expect("newer")
            terminal.send(CTRL_C)
            assert terminal.wait() == 130
        finally:
            terminal.close()


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Servers over both transports: those that work, and one that does everything wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kimi_mlx.errors import ToolError
from kimi_mlx.tools import connection, guard
from kimi_mlx.tools.config import ServerConfig
from kimi_mlx.tools.results import ToolResult
from kimi_mlx.tools.servers import McpServers

TESTS = Path(__file__).parents[2]
HOSTILE = (sys.executable, "-S", str(TESTS / "hostile_mcp_server.py"))
PATIENCE_S = 20.0


def hostile(*options: str, name: str = "hostile", **environment: str) -> ServerConfig:
    return ServerConfig(name, (*HOSTILE, *options), environment)


@contextmanager
def running(*configs: ServerConfig, call_s: float = PATIENCE_S) -> Generator[McpServers]:
    with McpServers(configs, call_s) as servers:
        servers.wait()
        yield servers


@pytest.fixture(scope="module")
def servers() -> Iterator[McpServers]:
    with running(hostile()) as servers:
        yield servers


def call(servers: McpServers, name: str, arguments: str = "{}") -> ToolResult:
    return servers.call(name, arguments).result(PATIENCE_S)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes(*words: str) -> list[int]:
    """Ids of the processes whose command line has all the words."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in listing.splitlines()]
    return [int(pid) for pid, *rest in lines if rest and all(word in rest[0] for word in words)]


def test_tools_and_status(servers: McpServers) -> None:
    status = servers.status()[0]
    assert (status.state, status.name) == ("ready", "hostile")
    names = [tool.name for tool in status.tools]
    assert {"good", "hostile__bad_name", "hostile__bad_name_2", "x" * 64} <= set(names)
    notes = {tool.name: tool.note for tool in status.tools}
    assert notes["good"] == ""
    assert "$.not" in notes["no_schema"]


def test_a_call(servers: McpServers) -> None:
    assert call(servers, "good") == ToolResult("good is done")
    assert call(servers, "hostile__bad_name_2") == ToolResult("bad/name! is done")


def test_calls_that_cannot_be_made(servers: McpServers) -> None:
    assert "there is no tool `other`; there are: good," in call(servers, "other").text
    assert "not a JSON object" in call(servers, "good", "[1]").text
    assert call(servers, "good", "[" * 100_000).is_error


def test_calls_run_at_the_same_time(servers: McpServers) -> None:
    """The server answers one call after the other, so the second waits in the server, not here."""
    futures = [servers.call("slow", "{}") for _ in range(3)]
    assert [future.result(PATIENCE_S).text for future in futures] == ["slow is done"] * 3


@pytest.mark.parametrize("name", ["flood", "flood_late_id"])
def test_a_result_that_is_too_large(servers: McpServers, name: str) -> None:
    result = call(servers, name)
    assert result.is_error
    assert "the result has more than 16 MiB" in result.text
    assert call(servers, "good").text == "good is done"


@pytest.mark.parametrize("name", [pytest.param("notify", marks=pytest.mark.slow), "complain", "garbage"])
def test_floods_beside_a_result(servers: McpServers, name: str) -> None:
    assert call(servers, name).text == f"{name} is done"


def test_nonsense(servers: McpServers) -> None:
    result = call(servers, "nonsense")
    assert result.is_error
    assert "its answer is not valid: content" in result.text


def test_errors_are_short_and_have_no_controls(servers: McpServers) -> None:
    result = call(servers, "rpc_error")
    assert result.is_error
    assert "cheese" in result.text
    assert len(result.text) < 600


def test_requests_of_the_server_are_refused(servers: McpServers) -> None:
    answers = json.loads(call(servers, "requests").text)
    assert "not supported" in answers["e"]["message"]
    assert "not supported" in answers["s"]["message"]
    assert "not supported" in answers["r"]["message"]
    assert answers["p"] == {}


def test_contents_other_than_text(servers: McpServers) -> None:
    assert call(servers, "picture").images[0].startswith(b"\x89PNG")
    lines = call(servers, "mixed").text.splitlines()
    assert lines[0] == "[audio, audio/wav, which the model cannot hear]"
    assert lines[1] == "[resource file:///notes: notes]"
    assert lines[2] == "inside"
    assert lines[3] == "[resource file:///b, binary, 69 B, not shown]"
    assert lines[4] == "[an image that is not valid base64]"
    assert call(servers, "empty").text == '{"a": 1}'


def test_the_environment_has_no_secrets(servers: McpServers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with running(hostile(GIVEN="1")) as own:
        environment = json.loads(call(own, "environment").text)
    assert environment["GIVEN"] == "1"
    assert environment["PATH"] == os.environ["PATH"]
    assert "HF_TOKEN" not in environment


def test_a_server_that_dies_is_started_again() -> None:
    with running(hostile()) as servers:
        result = call(servers, "die")
        assert result.is_error
        assert "it ended\n  out of cheese\n  the server exited with code 3" in result.text
        assert call(servers, "good").text == "good is done"
        assert "ended by SIGKILL" in call(servers, "killed").text
        until(lambda: servers.status()[0].state == "failed")
        assert "ended by SIGKILL" in servers.status()[0].error
        assert servers.tools[0].name == "good"
        assert any("hostile ended" in note for note in servers.take_notes())


def test_a_server_that_dies_and_leaves_a_child() -> None:
    with running(hostile()) as servers:
        assert "it ended" in call(servers, "die_with_child").text
        until(lambda: call(servers, "good").text == "good is done")


@pytest.mark.slow
def test_tools_that_change() -> None:
    with running(hostile()) as servers:
        assert call(servers, "grow").text == "grow is done"
        until(lambda: "grown" in [tool.name for tool in servers.tools])
        assert servers.tools[0].tool.description == "changed"
        assert servers.take_notes() == ["server hostile changed its tools: +grown ~good"]


def test_time_limit_and_cancellation() -> None:
    with running(hostile(), call_s=0.5) as servers:
        assert "no answer within" in call(servers, "hang").text
        future = servers.call("hang", "{}")
        time.sleep(0.1)
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result(PATIENCE_S)
        assert call(servers, "good").text == "good is done"


@pytest.mark.slow
def test_servers_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "START_S", 2.0)
    configs = [
        hostile(name="good"),
        ServerConfig("none", ("no-such-program",)),
        ServerConfig("joined", ("npx -y server",)),
        ServerConfig("folder", (sys.executable,), cwd="/no/folder"),
        ServerConfig("crash", (sys.executable, "-S", "-c", "import sys; sys.exit('set TOKEN \x1b[31m')")),
        ServerConfig("chatter", ("yes", "hello")),
        hostile("--silent", name="silent"),
        hostile("--bad-list", name="bad list"),
        ServerConfig("off", is_disabled=True),
        ServerConfig("refused", url="http://127.0.0.1:9/mcp"),
    ]
    with running(*configs) as servers:
        errors = {status.name: status.error for status in servers.status()}
        states = {status.name: status.state for status in servers.status()}
        assert call(servers, "good").text == "good is done"
    assert states.pop("off") == "disabled"
    assert states.pop("good") == "ready"
    assert set(states.values()) == {"failed"}
    assert "`no-such-program` is not found" in errors["none"]
    assert "its arguments as `args`" in errors["joined"]
    assert "`/no/folder` is not a folder" in errors["folder"]
    assert errors["crash"] == "it ended\n  set TOKEN\n  the server exited with code 1"
    assert "it did not start within 2 s\n  not a message: hello" in errors["chatter"]
    assert "it did not start within 2 s" in errors["silent"]
    assert "its answer is not valid" in errors["bad list"]
    assert "cannot connect to http://127.0.0.1:9/mcp" in errors["refused"]


def test_a_list_without_end() -> None:
    with running(hostile("--endless-list")) as servers:
        assert servers.status()[0].state == "ready"
        assert len({tool.name for tool in servers.tools}) == len(servers.tools)


def test_a_server_without_handshake() -> None:
    """Protocol version 2026-07-28."""
    with running(hostile("--modern")) as servers:
        assert servers.status()[0].error == ""
        assert call(servers, "good").text == "good is done"


def test_restart() -> None:
    with running(hostile()) as servers:
        first = json.loads(call(servers, "environment").text)
        servers.restart("hostile").result(PATIENCE_S)
        assert json.loads(call(servers, "environment").text) == first
        assert servers.status()[0].state == "ready"


@pytest.mark.slow
def test_stubborn_servers_and_their_children_end() -> None:
    mark = f"MARK-{os.getpid()}"
    with running(hostile("--stubborn", mark)):
        assert len(processes(mark)) == 2  # the guard and the server
        children = processes("grandchild")
        assert children
    until(lambda: not processes(mark))
    until(lambda: not set(children) & set(processes("grandchild")))


@pytest.mark.slow
def test_servers_end_when_the_chat_is_killed() -> None:
    mark = f"KILL-{os.getpid()}"
    code = (
        "import sys, time; from kimi_mlx.tools.config import ServerConfig\n"
        "from kimi_mlx.tools.servers import McpServers\n"
        "with McpServers([ServerConfig('a', tuple(sys.argv[1:]))]) as servers:\n"
        "    servers.wait(); print('ready', flush=True); time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *HOSTILE, "--stubborn", mark], stdout=subprocess.PIPE, text=True
    ) as chat:
        assert chat.stdout is not None
        try:
            assert chat.stdout.readline() == "ready\n"
            assert len(processes("hostile_mcp_server", mark)) == 3
        finally:
            chat.send_signal(signal.SIGKILL)
    until(lambda: not processes(mark))


def test_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolError, match="need the package `mcp`") as caught, McpServers([hostile()]):
        pass
    assert "install" in (caught.value.hint or "")


class _HostileHttp(BaseHTTPRequestHandler):
    """Answers each path with a fault."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = int(self.path[1:]) if self.path[1:].isdigit() else 200
        result = {
            "protocolVersion": "2025-06-18",
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "h", "version": "1"},
        }
        if body.get("method") == "tools/list":
            result = {"tools": [{"name": "big", "inputSchema": {"type": "object"}}]}
        elif body.get("method") == "tools/call":
            result = {"content": [{"type": "text", "text": "x" * (guard.MAX_MESSAGE_BYTES + 1)}]}
        data = json.dumps({"jsonrpc": "2.0", "id": body.get("id"), "result": result}).encode()
        if self.path == "/html":
            data = b"<html>\x1b[31m"
        self.send_response(status if "id" in body else 202)
        self.send_header("Content-Type", "text/html" if self.path == "/html" else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.send_error(405)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_http_servers_with_faults() -> None:
    http = ThreadingHTTPServer(("127.0.0.1", 0), _HostileHttp)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        names = ("401", "404", "500", "html", "good")
        with running(*(ServerConfig(name, url=f"{base}/{name}") for name in names)) as servers:
            errors = {status.name: status.error for status in servers.status()}
            result = call(servers, "big")
    finally:
        http.shutdown()
        http.server_close()
    assert "HTTP 401 Unauthorized; write" in errors["401"]
    assert "HTTP 404 Not Found; check the URL" in errors["404"]
    assert "HTTP 500" in errors["500"]
    assert "Unexpected content type: text/html" in errors["html"]
    assert errors["good"] == ""
    assert result.is_error
    assert "more than 16 MiB" in result.text

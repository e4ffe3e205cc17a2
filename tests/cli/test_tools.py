"""Chats with MCP servers, as users run them: one answer, and the conversation on a terminal."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kimi_mlx.tools.config import ServerConfig
from kimi_mlx.tools.servers import McpServers
from tests.cli.conftest import Spawn
from tests.command import call
from tests.processes import start
from tests.terminal import COMMAND, CONTROLLING_TERMINAL, CTRL_C, CTRL_D, ENTER

TESTS = Path(__file__).parents[1]
TOYS = [sys.executable, str(TESTS / "mcp_server.py")]
HOSTILE = [sys.executable, "-S", str(TESTS / "hostile_mcp_server.py")]
ASK = (
    CONTROLLING_TERMINAL
    + """
import signal, threading, time
from kimi_mlx.cli.chat.input.terminal_modes import quiet_between_prompts
from kimi_mlx.cli.chat.tools.tool_permissions import TerminalQuestion
from kimi_mlx.text.messages import ToolCall
from kimi_mlx.tools.declarations import DeclaredTool, ServerTool
kept, is_cancelled = [], threading.Event()
tool = DeclaredTool("roll_dice", ServerTool("toys", "roll_dice"), {})
with quiet_between_prompts():
    signal.signal(signal.SIGINT, lambda number, frame: is_cancelled.set())
    print("ready", flush=True)
    time.sleep(1.0)
    print("asks", flush=True)
    answer = TerminalQuestion(kept.append)(ToolCall("0", "roll_dice", "{}"), tool, is_cancelled)
print((answer, kept), flush=True)
"""
)
QUESTION = "(o)nce, this (t)ool, (a)ll, (N)o: "
LIMIT_S = 60


def write(folder: Path, **servers: object) -> str:
    """Write a file of servers, each given by its command or as it is; return its path."""
    path = folder / "mcp.json"
    entries = {
        name: {"command": server[0], "args": server[1:]} if isinstance(server, list) else server
        for name, server in servers.items()
    }
    path.write_text(json.dumps({"mcpServers": entries}))
    return str(path)


def chat(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call("chat", "--temp", "0", "--no-log", *arguments)


def processes(mark: str) -> str:
    listing = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in listing.splitlines() if mark in line)


def until_gone(mark: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while left := processes(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def toys_over_http(port: int) -> Iterator[str]:
    """Run the good server over streamable HTTP; yields its URL."""
    server = start([*TOYS, "--http", str(port)])
    try:
        deadline = time.monotonic() + LIMIT_S
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.kill()
        server.wait(LIMIT_S)


def test_one_answer_with_a_call(tmp_path: Path) -> None:
    done = chat(
        "--mcp", write(tmp_path, toys=[*HOSTILE, "roll_dice=roll_dice"]), "--allow", "roll_*", "-p", "Roll 4 dice."
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The tool says total: 12.\n"
    assert "3 tools of 1 MCP server" in done.stderr
    assert "roll_dice(count: 4)" in done.stderr


@pytest.mark.slow
def test_json_has_calls_and_results(tmp_path: Path) -> None:
    mcp = write(tmp_path, toys=[*HOSTILE, "roll_dice=roll_dice"])
    document = json.loads(chat("--mcp", mcp, "--allow", "all", "--json", "-p", "Roll 4 dice.").stdout)
    assert document["text"] == "The tool says total: 12."
    assert document["tool_calls"] == [
        {
            "id": "functions.roll_dice:0",
            "name": "roll_dice",
            "arguments": '{"count": 4}',
            "server": "toys",
            "result": '{"total": 12}',
            "is_error": False,
        }
    ]


@pytest.mark.slow
def test_calls_that_are_not_allowed_are_refused(tmp_path: Path) -> None:
    mcp = write(tmp_path, toys=[*HOSTILE, "roll_dice=roll_dice"])
    done = chat("--mcp", mcp, "--allow", "set_alarm,other", "--json", "--max-rounds", "1", "-p", "Roll 4 dice.")
    document = json.loads(done.stdout)
    assert document["tool_calls"][0]["result"] == "the user did not allow this call"
    assert "warning: --allow other: no server has such a tool" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "code"),
    [
        (["--allow", "x", "-p", "hi"], "--allow needs --mcp", 2),
        (["--mcp", "none.json", "-p", "hi"], "`none.json` cannot be read", 2),
    ],
)
def test_wrong_options(arguments: list[str], error: str, code: int) -> None:
    done = chat(*arguments)
    assert error in done.stderr
    assert done.returncode == code


@pytest.mark.slow
def test_servers_that_fail_are_reported_and_the_others_used(tmp_path: Path) -> None:
    crash = [sys.executable, "-S", "-c", "import sys; sys.exit('set \x1b[31mTOKEN')"]
    mcp = write(tmp_path, crash=crash, toys=[*HOSTILE, "roll_dice=roll_dice"])
    done = chat("--mcp", mcp, "--allow", "all", "-q", "-p", "Roll 4 dice.")
    assert done.stdout == "The tool says total: 12.\n"
    assert done.stderr == "warning: MCP server crash: it ended\n  set TOKEN\n  the server exited with code 1\n"
    done = chat("--mcp", write(tmp_path, crash=crash), "-p", "Roll 4 dice.")
    assert done.returncode == 1
    assert "no MCP server has started" in done.stderr


@pytest.mark.slow
def test_the_good_server_over_both_transports(tmp_path: Path) -> None:
    with toys_over_http(free_port()) as url:
        for server, prompt, answer in (
            (TOYS, "Roll 4 dice.", "The tool says total: 12."),
            (TOYS, "Wake me at 07:30.", "The tool says alarm: on."),
            ({"url": url}, "Turn the light in the kitchen on.", "The tool says status: done."),
        ):
            done = chat("--mcp", write(tmp_path, toys=server), "--allow", "all", "-p", prompt)
            assert done.stdout == f"{answer}\n", done.stderr


@pytest.mark.slow
def test_an_http_server_that_is_started_again() -> None:
    port = free_port()

    def roll(servers: McpServers) -> str:
        return servers.call("roll_dice", '{"count": 4}').result(LIMIT_S).text

    with toys_over_http(port) as url:
        servers = McpServers([ServerConfig("toys", url=url)]).__enter__()
        servers.wait()
        assert roll(servers) == '{"total": 12}'
    try:
        assert f"cannot connect to {url}" in roll(servers)
        assert f"not available: cannot connect to {url}" in roll(servers)
        with toys_over_http(port):
            assert roll(servers) == '{"total": 12}'
        with toys_over_http(port):
            texts = [roll(servers), roll(servers)]
            assert texts[-1] == '{"total": 12}'
            assert "lost the session; call again" in texts[0] or "cannot connect" in texts[0]
    finally:
        servers.close()


@pytest.mark.slow
def test_with_a_running_server_of_the_model(tmp_path: Path) -> None:
    """`--url`: the tools run here, the model there."""
    process = start([sys.executable, "-m", "kimi_mlx", "serve", "--port", "0"], text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "http://" in line)
        url = f"http://127.0.0.1:{line.split('http://127.0.0.1:')[1].split('/')[0].split()[0]}"
        mcp = write(tmp_path, toys=[*HOSTILE, "roll_dice=roll_dice"])
        done = chat("--url", url, "--mcp", mcp, "--allow", "all", "-p", "Roll 4 dice.")
        assert done.stdout == "The tool says total: 12.\n", done.stderr
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT_S)


@pytest.mark.slow
def test_permission_is_asked_for_in_a_conversation(spawn: Spawn, tmp_path: Path) -> None:
    mcp = write(tmp_path, toys=[*HOSTILE, "roll_dice=roll_dice"])
    terminal = spawn(COMMAND, "chat", "--temp", "0", "--mcp", mcp)
    terminal.expect("\n> ")
    terminal.send("Roll 4 dice." + ENTER)
    terminal.expect(f"Allow roll_dice of toys? {QUESTION}")
    terminal.send("and then" + ENTER)  # not an answer
    terminal.expect(QUESTION)
    terminal.send("o" + ENTER)
    terminal.expect("The tool says total: 12.\n")
    terminal.send("Roll 4 dice." + ENTER)
    terminal.expect(QUESTION)
    terminal.send("T" + ENTER)
    terminal.expect("The tool says total: 12.\n")
    terminal.expect("\n> ")
    assert QUESTION not in terminal.ask("Roll 4 dice." + ENTER)
    listing = terminal.ask("/tools" + ENTER)
    assert "toys  hostile 1" in listing
    assert "✓ roll_dice" in listing
    assert '"count"' in terminal.ask("/tools roll_dice" + ENTER)
    assert "✓" not in terminal.ask("/tools reload" + ENTER)
    assert "there is no tool `nope`" in terminal.ask("/tools nope" + ENTER)
    terminal.send(CTRL_C + CTRL_D)
    assert terminal.wait() == 0
    assert terminal.has_old_modes()


@pytest.mark.slow
def test_ctrl_c_ends_a_call_and_not_the_chat(spawn: Spawn, tmp_path: Path) -> None:
    mark = f"hang-{tmp_path.name}"
    mcp = write(tmp_path, toys=[*HOSTILE, "roll_dice=hang", mark])
    terminal = spawn(COMMAND, "chat", "--temp", "0", "--mcp", mcp, "--allow", "roll_dice", "--no-thinking")
    terminal.expect("\n> ")
    terminal.send("Roll 4 dice." + ENTER)
    terminal.expect("running roll_dice")
    assert mark in processes(mark)
    terminal.send(CTRL_C)
    terminal.expect("[stopped]")
    terminal.expect("\n> ")
    terminal.send("Wake me at 07:30." + ENTER)
    terminal.expect(QUESTION)
    terminal.send(CTRL_C)
    terminal.expect("[stopped]")
    terminal.expect("\n> ")
    terminal.send(CTRL_D)
    assert terminal.wait() == 0
    until_gone(mark)


def test_text_before_a_question_is_kept_and_does_not_answer_it(spawn: Spawn) -> None:
    terminal = spawn(ASK)
    terminal.expect("ready")
    terminal.send("all" + ENTER + "not")
    terminal.expect("asks")
    terminal.expect(QUESTION)
    terminal.send("o" + ENTER)
    terminal.expect("('once', ['all\\nnot'])")
    assert terminal.wait() == 0
    assert terminal.has_old_modes()


@pytest.mark.slow
@pytest.mark.parametrize("key", [CTRL_C, CTRL_D, ENTER])
def test_keys_that_mean_no(spawn: Spawn, key: str) -> None:
    terminal = spawn(ASK)
    terminal.expect(QUESTION)
    terminal.send(key)
    terminal.expect("('no', [])")
    assert terminal.has_old_modes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ("die", "out of cheese"),
        ("flood", "more than 16 MiB"),
        pytest.param("nonsense", "its answer is not valid", marks=pytest.mark.sweep),
        pytest.param("escape", "gone", marks=pytest.mark.sweep),
    ],
)
def test_faults_are_shown(spawn: Spawn, tmp_path: Path, fault: str, shown: str) -> None:
    mcp = write(tmp_path, toys=[*HOSTILE, f"roll_dice={fault}"])
    terminal = spawn(COMMAND, "chat", "--temp", "0", "--mcp", mcp, "--allow", "roll_dice", "--max-rounds", "1")
    terminal.expect("\n> ")
    terminal.send("Roll 4 dice." + ENTER)
    terminal.expect(shown)
    terminal.send(CTRL_C)
    assert b"\x1b]0;owned" not in terminal.raw


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
    + [pytest.param(number, marks=pytest.mark.sweep) for number in (signal.SIGTERM, signal.SIGHUP)],
)
def test_no_process_is_left_when_the_chat_is_killed(spawn: Spawn, tmp_path: Path, number: int) -> None:
    mark = f"killed-{number}-{tmp_path.name}"
    mcp = write(tmp_path, toys=[*HOSTILE, "roll_dice=hang", "--stubborn", mark])
    terminal = spawn(COMMAND, "chat", "--temp", "0", "--mcp", mcp, "--allow", "roll_dice")
    terminal.expect("\n> ")
    terminal.send("Roll 4 dice." + ENTER)
    terminal.expect("running roll_dice")
    assert processes(mark).count("\n") == 1  # the guard and the server
    terminal.signal(number)
    assert terminal.wait() != 0
    until_gone(mark)


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_servers(spawn: Spawn, tmp_path: Path) -> None:
    mark = f"silent-{tmp_path.name}"
    mcp = write(tmp_path, silent=[*HOSTILE, "--silent", mark], toys=[*HOSTILE, "roll_dice=roll_dice"])
    terminal = spawn(COMMAND, "chat", "--temp", "0", "--mcp", mcp, "--allow", "all")
    terminal.expect("starting MCP servers: silent")
    terminal.send(CTRL_C)
    terminal.expect("not waiting for silent")
    terminal.expect("\n> ")
    assert "The tool says total: 12." in terminal.ask("Roll 4 dice." + ENTER)
    terminal.send(CTRL_D)
    assert terminal.wait() == 0
    until_gone(mark)


@pytest.mark.slow
def test_ctrl_c_in_one_answer(spawn: Spawn, tmp_path: Path) -> None:
    mark = f"one-{tmp_path.name}"
    mcp = write(tmp_path, toys=[*HOSTILE, "roll_dice=hang", mark])
    terminal = spawn(COMMAND, "chat", "--temp", "0", "--mcp", mcp, "--allow", "all", "-p", "Roll 4 dice.")
    terminal.expect("running roll_dice")
    terminal.send(CTRL_C)
    assert terminal.wait() == 130
    until_gone(mark)


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        data = b"<html><body><h1>Cheese</h1><p>It is yellow.</p></body></html>"
        self.send_response(200 if self.path == "/cheese" else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_servers_of_others(tmp_path: Path) -> None:
    """mcp-server-git in a repository, and mcp-server-fetch with a local page."""
    repository = tmp_path / "repository"
    commands = (["init", "-q", "-b", "main"], ["commit", "-q", "--allow-empty", "-m", "Add cheese"])
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in commands:
        subprocess.run(
            ["git", *identity, "-C", str(repository), *command]
            if repository.exists()
            else ["git", *command, str(repository)],
            check=True,
        )
    page = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    configs = [
        ServerConfig("git", (sys.executable, "-m", "mcp_server_git", "--repository", str(repository))),
        ServerConfig("fetch", (sys.executable, "-m", "mcp_server_fetch", "--ignore-robots-txt", "--allow-private-ips")),
    ]
    try:
        with McpServers(configs) as servers:
            servers.wait()
            assert [status.error for status in servers.status()] == ["", ""]
            assert all(tool.note == "" for tool in servers.tools)
            log = servers.call("git_log", json.dumps({"repo_path": str(repository)})).result(LIMIT_S)
            assert "Add cheese" in log.text
            url = f"http://127.0.0.1:{page.server_address[1]}"
            fetched = servers.call("fetch", json.dumps({"url": f"{url}/cheese"})).result(LIMIT_S)
            assert "It is yellow." in fetched.text
            assert servers.call("fetch", json.dumps({"url": f"{url}/none"})).result(LIMIT_S).is_error
    finally:
        page.shutdown()
        page.server_close()

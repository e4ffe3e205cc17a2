"""`kimi-mlx chat --url` and servers on this machine, on a terminal and in pipes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.client.local_servers import LocalServer, announce
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import Session, SessionOptions
from tests.cli.conftest import Spawn
from tests.command import call
from tests.fakes import KIMI_MINI, FixedSession
from tests.server.running_server import RunningServer, serving, wait_until
from tests.terminal import COMMAND, CTRL_C, ENTER

QUESTION = "What are you?"
GREEDY = ("-t", "0")
KIMI_MINI_VL = KIMI_MINI.with_name("kimi-mini-vl")
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "two-red-circles.png"


@pytest.fixture
def server(running: RunningServer) -> RunningServer:
    return running


def test_one_answer_equals_that_of_a_local_model(server: RunningServer) -> None:
    here = call("chat", "kimi-mini", "-p", QUESTION, *GREEDY)
    there = call("chat", "--url", server.url, "-p", QUESTION, *GREEDY)
    assert there.returncode == 0
    assert there.stdout == here.stdout
    assert "tok/s" in there.stderr


@pytest.mark.slow
def test_json_of_one_answer_equals_that_of_a_local_model(server: RunningServer) -> None:
    arguments = ("-p", QUESTION, *GREEDY, "--json")
    here, there = (
        json.loads(call("chat", *where, *arguments).stdout) for where in (["kimi-mini"], ["--url", server.url])
    )
    same = ("text", "reasoning", "tool_calls", "finish_reason")
    assert {name: there[name] for name in same} == {name: here[name] for name in same}
    assert there["statistics"].keys() == here["statistics"].keys()
    assert there["placement"]["reason"] == f"served at {server.url}"


@pytest.mark.slow
def test_pipes_schemas_and_system_prompts_work_there(server: RunningServer) -> None:
    url = ("--url", server.url, *GREEDY, "-q")
    here = call("chat", "kimi-mini", "--system", "Be brief.", "-p", "-", *GREEDY, "-q", stdin=QUESTION)
    assert call("chat", *url, "--system", "Be brief.", "-p", "-", stdin=QUESTION).stdout == here.stdout
    schema = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}'
    assert json.loads(call("chat", *url, "-p", "Choose", "--schema", schema).stdout)["a"] in (1, 2)


@pytest.mark.slow
def test_images_are_sent() -> None:
    with (
        closing(open_session(SessionOptions(KIMI_MINI_VL))) as session,
        serving(session, folder=KIMI_MINI_VL) as vl_server,
    ):
        arguments = ("--image", str(PICTURE), "-p", "What do you see?", *GREEDY)
        there = call("chat", "--url", vl_server.url, *arguments)
    assert there.stdout == call("chat", "kimi-mini-vl", *arguments).stdout
    assert "circles" in there.stdout


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("--url", "ftp://x"), "is not the address of a server", "http://mac-a:8080"),
        (("--url", "http://127.0.0.1:9"), "connection refused", "kimi-mlx serve MODEL"),
        (("--url", "http://127.0.0.1:9", "--load"), "exclude each other", "leave one"),
        (("--url", "http://127.0.0.1:9", "--api-key-file", "/nowhere"), "no such file", "openssl"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, hint: str) -> None:
    done = call("chat", *arguments, "-p", "hi")
    assert done.returncode in (1, 2)
    assert message in done.stderr.replace("\n", " ")
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_served_and_images_for_a_text_model(server: RunningServer) -> None:
    done = call("chat", "kimi-k2", "--url", server.url, "-p", "hi")
    assert (done.returncode, "does not serve `kimi-k2`" in done.stderr) == (2, True)
    done = call("chat", "--url", server.url, "-p", "hi", "--image", str(PICTURE))
    assert (done.returncode, "does not see images" in done.stderr) == (1, True)


def test_options_of_loading_are_named_as_without_effect(server: RunningServer) -> None:
    done = call("chat", "--url", server.url, "-p", QUESTION, "--speculate", "4", "--max-tokens", "3", "--no-thinking")
    assert (done.returncode, "without effect at a server: --speculate" in done.stderr) == (0, True)


def test_a_key(session: Session, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret\n")
    with serving(session, ServingOptions(Security("127.0.0.1", ("secret",)))) as server:
        arguments = ("chat", "--url", server.url, "-p", QUESTION, "--max-tokens", "3", "--no-thinking")
        assert call(*arguments, "--api-key-file", str(keys)).returncode == 0
        assert call(*arguments, variables={"KIMI_MLX_API_KEY": "secret"}).returncode == 0
        done = call(*arguments)
        assert (done.returncode, "needs an API key" in done.stderr, "--api-key-file" in done.stderr) == (1, True, True)


@pytest.mark.slow
def test_a_conversation_at_a_server(spawn: Spawn, server: RunningServer) -> None:
    terminal = spawn(COMMAND, "chat", "--url", server.url, *GREEDY)
    assert "kimi-mini" in terminal.expect("\n> ")
    assert "toy model" in terminal.ask(QUESTION + ENTER)
    assert "tok/s" in terminal.ask("/stats" + ENTER)
    terminal.send("/quit" + ENTER)
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_at_the_server(spawn: Spawn) -> None:
    ids = ChatTokenizer.load(KIMI_MINI).encode("on and ")
    with serving(FixedSession(ids, pause_s=0.02, is_endless=True)) as server:
        terminal = spawn(COMMAND, "chat", "--url", server.url, "--no-thinking")
        terminal.expect("\n> ")
        terminal.send("hello" + ENTER)
        terminal.expect("on and on and")
        terminal.send(CTRL_C)
        terminal.expect("\n> ")
        server.wait_idle(2)
        terminal.send("again" + ENTER)
        terminal.expect("on and on and")
        server.server.should_exit = True
        assert "shutting down" in terminal.expect("\n> ")
    terminal.send("more" + ENTER)
    terminal.expect("connection refused")
    terminal.expect("\n> more")  # the message comes back


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model that does not come with the package."""
    folder = tmp_path / "model"
    shutil.copytree(KIMI_MINI, folder)
    return folder


def record(server: RunningServer, folder: Path) -> LocalServer:
    return LocalServer(server.url, "big-model", str(folder.resolve()), 10**12, (), False, os.getpid(), time.time())


@pytest.mark.slow
def test_a_server_on_this_machine_is_offered(
    spawn: Spawn, server: RunningServer, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with announce(record(server, model_folder)):
        question = f"big-model is already served at {server.url} (since "
        before = server.metric('kimi_mlx_tokens_total{kind="completion"}')
        terminal = spawn(COMMAND, "chat", str(model_folder), *GREEDY, columns=200)
        terminal.expect(question)
        terminal.expect("Use it? [Y/n]:")
        terminal.send(ENTER)
        terminal.expect("\n> ")
        terminal.ask(QUESTION + ENTER)
        wait_until(lambda: server.metric('kimi_mlx_tokens_total{kind="completion"}') > before)
        terminal = spawn(COMMAND, "chat", str(model_folder), *GREEDY, columns=200)
        terminal.expect(question)
        terminal.expect("Use it? [Y/n]:")
        terminal.send("n" + ENTER)
        terminal.expect("\n> ")
        count = server.metric('kimi_mlx_tokens_total{kind="completion"}')
        terminal.ask(QUESTION + ENTER)
        assert server.metric('kimi_mlx_tokens_total{kind="completion"}') == count


@pytest.mark.slow
def test_without_a_terminal_a_server_on_this_machine_is_used(
    server: RunningServer, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    arguments = ("chat", str(model_folder), "-p", QUESTION, *GREEDY)
    expected = call(*arguments).stdout
    running = record(server, model_folder)
    with announce(running):
        done = call(*arguments)
        assert (done.stdout, f"using the server at {server.url}" in done.stderr) == (expected, True)
        assert json.loads(call(*arguments, "--json").stdout)["placement"]["reason"] == f"served at {server.url}"
        for options in (["--load"], ["--dtype", "float32"]):
            done = call(*arguments, *options)
            assert (done.stdout, "using the server" in done.stderr) == (expected, False)
    for other in (replace(running, weights_bytes=1000), replace(running, url="http://127.0.0.1:9")):
        with announce(other):
            assert "using the server" not in call(*arguments).stderr
    with announce(replace(running, needs_key=True)):
        assert "needs a key" in call(*arguments).stderr


@pytest.mark.slow
def test_defaults_of_the_configuration_give_way(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    config = tmp_path / "kimi-mlx" / "config.toml"
    config.parent.mkdir()
    config.write_text('model = "kimi-k2"\nranks = 2\n')
    done = call("chat", "--url", server.url, "-p", QUESTION, *GREEDY)
    assert (done.returncode, "without effect" in done.stderr) == (0, False)
    config.write_text(f'[chat]\nurl = "{server.url}"\n')
    assert call("chat", "-p", QUESTION, *GREEDY).stdout == done.stdout


@pytest.mark.slow
def test_tools_are_called_in_a_chat_with_a_server(server: RunningServer, tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "mcp_server.py"
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"toys": {"command": sys.executable, "args": [str(program)]}}}))
    arguments = ("-q", *GREEDY, "--mcp", str(file), "--allow", "all", "-p", "Roll 3 dice")
    there = call("chat", "--url", server.url, *arguments)
    assert there.stdout == call("chat", "kimi-mini", *arguments).stdout
    assert "total" in there.stdout


@pytest.mark.slow
def test_the_key_of_a_server_on_this_machine_is_requested(
    spawn: Spawn, session: Session, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with (
        serving(session, ServingOptions(Security("127.0.0.1", ("secret",)))) as server,
        announce(replace(record(server, model_folder), needs_key=True)),
    ):
        terminal = spawn(COMMAND, "chat", str(model_folder), *GREEDY, columns=200)
        terminal.expect("Use it? [Y/n]:")
        terminal.send(ENTER)
        terminal.expect("File with its API key:")
        terminal.send(str(keys) + ENTER)
        terminal.expect(f"connected to {server.url}")
        terminal.expect("\n> ")
        assert "toy model" in terminal.ask(QUESTION + ENTER)

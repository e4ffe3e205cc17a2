"""`kimi-mlx chat --continue` and `--no-log`, with kimi-mini."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Spawn
from tests.command import call
from tests.terminal import COMMAND, CTRL_D, ENTER

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def ask_json(*arguments: str) -> dict[str, Any]:
        done = call("chat", "--json", "--no-thinking", "--max-tokens", "8", "-t", "0", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask_json


def listed() -> list[tuple[str, str, int]]:
    conversations = json.loads(call("history", "--json").stdout)
    return [(item["id"], item["title"], item["turns"]) for item in conversations]


@pytest.mark.slow
def test_single_answers_are_stored_and_continued(ask: Ask) -> None:
    first = ask("-p", "Hello", "--system", "Be brief.", "--seed", "5")
    assert listed() == [(first["conversation"], "Hello", 1)]
    other = ask("-p", "Who are you?")
    assert ask("-p", "What are you?", "--continue", first["conversation"][:5])["conversation"] == first["conversation"]
    assert ask("-c", "-p", "Hello again")["conversation"] == first["conversation"]
    assert ask("-p", "What are you?", "--continue=WHO ARE")["conversation"] == other["conversation"]
    assert listed() == [(other["conversation"], "Who are you?", 2), (first["conversation"], "Hello", 3)]
    shown = json.loads(call("history", "show", "hello", "--json").stdout)
    assert shown["messages"][0] == {"role": "system", "content": "Be brief."}
    assert shown["settings"]["sampling"] == {"temperature": 0, "seed": 5}


@pytest.mark.slow
def test_a_chat_without_a_log_leaves_nothing(ask: Ask, tmp_path: Path) -> None:
    assert ask("-p", "Hello", "--no-log")["conversation"] is None
    assert not (tmp_path / "data").exists()
    ask("-p", "Hello")
    assert ask("-p", "What are you?", "-c", "--no-log")["conversation"] is None
    assert [turns for _, _, turns in listed()] == [1]


def test_a_conversation_that_is_not_there(ask: Ask) -> None:
    nothing = call("chat", "-p", "Hello", "--continue")
    assert nothing.returncode == 1
    assert "there are no conversations yet" in nothing.stderr
    ask("-p", "Hello")
    wrong = call("chat", "-p", "Hello", "-c", "kimi-mini")
    assert wrong.returncode == 1
    assert "there is no conversation `kimi-mini`" in wrong.stderr
    assert "a model comes before --continue" in wrong.stderr


@pytest.mark.slow
def test_a_conversation_on_a_terminal(spawn: Spawn) -> None:
    terminal = spawn(COMMAND, "chat", "kimi-mini", "--max-tokens", "8", "--no-thinking")
    terminal.expect("\n> ")
    terminal.ask("What are you?" + ENTER)
    terminal.send(CTRL_D)
    terminal.expect("continues this conversation")
    assert terminal.wait() == 0
    terminal = spawn(COMMAND, "chat", "--continue")
    assert "> What are you?" in terminal.expect("\n> ").replace("\n", " ") + terminal.expect("\n> ")
    assert "What are you?" in terminal.ask("/title" + ENTER)
    terminal.send(CTRL_D)
    assert terminal.wait() == 0

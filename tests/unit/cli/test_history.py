"""`kimi-mlx history`: its actions, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kimi_mlx.cli.chat.output.terminal_text import cell_width
from kimi_mlx.cli.history_output import conversation_table, format_when
from kimi_mlx.history.openai_format import read_conversation
from kimi_mlx.history.records import ConversationRecord
from kimi_mlx.history.store import HistoryStore
from kimi_mlx.text.messages import Delta, Message
from tests.command import call

Add = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HistoryStore]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    opened = HistoryStore.open(tmp_path / "kimi-mlx" / "conversations")
    yield opened
    opened.close()


@pytest.fixture
def add(store: HistoryStore) -> Add:
    def add_conversation(*texts: str) -> str:
        conversation = store.create("kimi-mini")
        for text, role in zip(texts, ["user", "assistant"] * len(texts), strict=False):
            store.add_message(conversation.number, Message(role, text), "kimi-mini", {"system": "Be brief."})
        store.release(conversation.number)
        return conversation.id

    return add_conversation


def test_conversations_are_listed_latest_first(add: Add) -> None:
    first, second = add("What is MLX?", "A framework."), add("Tell me a joke", "No.", "Please")
    lines = call("history").stdout.splitlines()
    assert lines[0].split() == ["id", "when", "model", "title", "turns"]
    assert lines[1].startswith(second)
    assert lines[1].endswith(" 2")
    assert lines[2].startswith(first)
    listed = json.loads(call("history", "--json").stdout)
    assert [(item["id"], item["title"], item["turns"]) for item in listed] == [
        (second, "Tell me a joke", 2),
        (first, "What is MLX?", 1),
    ]
    assert "the latest 1 of 2; --all lists all" in call("history", "-n", "1").stderr


def test_an_empty_history(store: HistoryStore) -> None:
    result = call("history")
    assert (result.returncode, result.stdout) == (0, "")
    assert "there are no conversations yet" in result.stderr
    assert json.loads(call("history", "--json").stdout) == []
    assert call("history", "show").returncode == 1


def test_a_search(add: Add) -> None:
    identity = add("What is MLX?", "A framework for arrays.")
    add("Tell me a joke", "No.")
    result = call("history", "ARRAYS", "framework")
    assert result.stdout.splitlines() == [
        f"{identity}  {result.stdout[10:21]}  What is MLX? · in 1 message",
        "  assistant: A framework for arrays.",
    ]
    assert json.loads(call("history", "--json", "joke").stdout)[0]["matches"] == 1
    nothing = call("history", "xyz", "abc")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "no conversation has `xyz` and `abc`" in nothing.stderr


def test_words_that_are_actions_can_be_searched(add: Add) -> None:
    add("show me the way")
    assert "show me the way" in call("history", "search", "show").stdout
    result = call("history", "show", "me", "the way")
    assert result.returncode == 2
    assert "kimi-mlx history search show" in result.stderr


def test_a_conversation_is_shown(add: Add, store: HistoryStore) -> None:
    identity = add("What is MLX?", "A *framework* \x1b[31mred")
    text = call("history", "show", identity[:5]).stdout
    assert "## You\n\nWhat is MLX?\n\n## kimi-mini\n\nA *framework* [31mred\n" in text
    assert call("history", "show").stdout == text
    store.add_delta(store.begin_answer(1, "kimi-mini", {"system": "Be brief."}), 0, Delta("And"))
    assert "And\n\n*[unfinished" in call("history", "show").stdout
    document = json.loads(call("history", "show", "mlx", "--json").stdout)
    assert [message["role"] for message in document["messages"]] == ["system", "user", "assistant", "assistant"]
    assert document["details"][2]["finished"] is None


def test_removed_messages_are_shown_with_all(add: Add, store: HistoryStore) -> None:
    add("What is MLX?", "A framework.")
    store.remove_last(1, 1)
    assert "framework" not in call("history", "show").stdout
    assert "## kimi-mini (removed)" in call("history", "show", "--all").stdout


def test_a_conversation_is_exported(add: Add, tmp_path: Path) -> None:
    identity = add("What is MLX?", "A framework.")
    target = tmp_path / "chat.json"
    assert call("history", "export", identity, str(target)).returncode == 0
    read = read_conversation(target)
    assert (read.system, [message.content for message in read.messages]) == (
        "Be brief.",
        ["What is MLX?", "A framework."],
    )
    assert json.loads(call("history", "export", identity).stdout) == json.loads(target.read_text())
    refused = call("history", "export", identity, str(target))
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    markdown = tmp_path / "chat.md"
    markdown.write_text("old")
    assert call("history", "export", identity, str(markdown), "--yes").returncode == 0
    assert markdown.read_text().startswith("# What is MLX?\n")
    assert "is a folder" in call("history", "export", identity, str(tmp_path)).stderr
    assert "there is no folder" in call("history", "export", identity, str(tmp_path / "a" / "b")).stderr


def test_conversations_are_removed(add: Add) -> None:
    first, second, third = add("one"), add("two"), add("three")
    refused = call("history", "rm", first)
    assert refused.returncode == 2
    assert "nothing is removed" in refused.stderr
    assert call("history", "rm").returncode == 2
    assert call("history", "rm", "--all", first).returncode == 2
    assert call("history", "rm", first, "nothing", "--yes").returncode == 1
    result = call("history", "rm", first, "two", first, "--yes")
    assert result.stdout == "removed 2 conversations\n"
    assert "not erased" in result.stderr
    assert [item["id"] for item in json.loads(call("history", "--json").stdout)] == [third]
    assert [item["id"] for item in json.loads(call("history", "rm", "--all", "--yes", "--json").stdout)] == [third]
    assert json.loads(call("history", "--json").stdout) == []
    assert second


def test_a_conversation_that_is_open_is_not_removed(add: Add, store: HistoryStore) -> None:
    identity = add("one")
    script = (
        "import sys; from pathlib import Path; from kimi_mlx.history.store import HistoryStore\n"
        "print(HistoryStore.open(Path(sys.argv[1])).acquire(1), flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(store.path.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        result = call("history", "rm", "--all", "--yes")
        holder.kill()
    assert result.returncode == 1
    assert f"`{identity}` (one) is open in a chat" in result.stderr
    assert call("history", "rm", "--all", "--yes").returncode == 0


def test_the_table_fits_the_terminal() -> None:
    from rich.console import Console

    title, model = "a title that is much too long " * 9, "/a/long/folder/with/a-model-of-a-long-name-too"
    rows = [
        ConversationRecord(1, "abcdefgh", title, model, None, 0.0, 0.0, 12345),
        ConversationRecord(2, "abcdefgh", "漢字" * 90, "m", None, 0.0, 0.0, 12345),
    ]
    for width in (40, 80, 200):
        console = Console(width=width, color_system=None)
        with console.capture() as capture:
            console.print(conversation_table(rows, width))
        lines = capture.get().splitlines()
        assert len(lines) == 3
        assert max(map(cell_width, lines)) <= width
        assert [line.split()[-1] for line in lines] == ["turns", "12345", "12345"]
        assert [line.split()[0] for line in lines] == ["id", "abcdefgh", "abcdefgh"]


def test_times_of_another_year_have_their_year() -> None:
    assert format_when(86400.0 * 365) == "1971-01-01"

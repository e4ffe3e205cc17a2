"""Commands of the chat that change, store and continue conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.cli.chat.chat_history import NO_RESULT, ChatHistory
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.options import HistoryOptions
from kimi_mlx.cli.chat.repl import Repl
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.history.store import HistoryStore, open_history
from kimi_mlx.session.chat_model import ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.text.messages import Delta, Message, ToolCall
from tests.fakes import conversation_of


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def store() -> Iterator[HistoryStore]:
    with closing(open_history()) as opened:
        yield opened


def start(
    name: str | None = None, is_logged: bool = True, conversation: Conversation | None = None
) -> tuple[Repl, ReplState]:
    """Begin a chat as `kimi-mlx chat` does, optionally with --continue and --no-log."""
    history = ChatHistory.open(HistoryOptions(name, not is_logged))
    conversation = conversation or conversation_of("The answer.")
    history.attach(conversation, None)
    state = ReplState(conversation, history=history)
    return Repl(state), state


def handle(repl: Repl, text: str) -> bool:
    return repl.handle(UserInput(text))


def texts(state: ReplState) -> list[object]:
    return [message.content for message in state.conversation.messages]


def stored(store: HistoryStore) -> list[list[object]]:
    """Contents of the messages of all conversations, latest first."""
    return [[item.message.content for item in store.messages(found.number)] for found in store.conversations()]


def test_undo_and_retry(store: HistoryStore, capfd: pytest.CaptureFixture[str]) -> None:
    repl, state = start()
    for typed in ("first", "second", "/undo", "/retry", "third"):
        assert handle(repl, typed)
    assert texts(state) == ["first", "The answer.", "third", "The answer."]
    assert stored(store) == [texts(state)]
    assert "took back: second" in capfd.readouterr().err
    for typed in ("/undo", "/undo"):
        assert handle(repl, typed)
    assert not handle(repl, "/retry")
    assert stored(store) == [[]]
    assert handle(repl, "/undo")
    assert "there is no message to take back" in capfd.readouterr().err


def test_a_fork_is_independent(store: HistoryStore, capfd: pytest.CaptureFixture[str]) -> None:
    repl, _ = start()
    handle(repl, "/fork")
    assert "the conversation has no messages yet" in capfd.readouterr().err
    for typed in ("first", "/fork", "second"):
        handle(repl, typed)
    assert stored(store) == [["first", "The answer.", "second", "The answer."], ["first", "The answer."]]


def test_the_title(store: HistoryStore, capfd: pytest.CaptureFixture[str]) -> None:
    repl, _ = start()
    for typed in ("/title", "What is MLX?", "/title", "/title  My\x1b[31m title ", "/title"):
        handle(repl, typed)
    assert store.conversations()[0].title == "My title"
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line in ("there is no message yet", "What is MLX?", "My title")] == [
        "there is no message yet",
        "What is MLX?",
        "My title",
    ]


def test_a_conversation_is_continued_with_its_settings(capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("The answer.")
    conversation.system = "Be brief."
    conversation.options = ChatOptions(max_tokens=50, sampling={"temperature": 0.5, "top_k": 3})
    repl, state = start(conversation=conversation)
    handle(repl, "first")
    state.history.close()
    other = conversation_of("Another answer.")
    other.options = ChatOptions(sampling={"temperature": 0.1})
    repl, state = start("", conversation=other)
    assert texts(state) == ["first", "The answer."]
    assert other.system == "Be brief."
    assert other.options == ChatOptions(max_tokens=50, sampling={"temperature": 0.1, "top_k": 3})
    handle(repl, "second")
    assert state.history.store.conversations()[0].num_turns == 2
    capfd.readouterr()
    state.history.log.model = "other"  # pyright: ignore[reportOptionalMemberAccess]
    repl._conversations.show_resumed()
    shown = capfd.readouterr()
    assert "continuing `" in shown.err
    assert "> second" in shown.err
    assert "Another answer." in shown.out


def test_an_unfinished_answer_is_shown_as_such(store: HistoryStore, capfd: pytest.CaptureFixture[str]) -> None:
    number = store.create("other").number
    store.add_message(number, Message("user", "count"), "other", {})
    store.add_delta(store.begin_answer(number, "other", {}), 0, Delta("one two"))
    store.release(number)
    repl, state = start("count")
    repl._conversations.show_resumed()
    shown = capfd.readouterr()
    assert shown.out == "one two\n"
    assert "so far this conversation was with other; now it is with fake" in shown.err
    assert "[unfinished; /retry answers again]" in shown.err
    handle(repl, "/retry")
    assert texts(state) == ["count", "The answer."]
    assert stored(store) == [["count", "The answer."]]


def test_a_message_without_an_answer_can_be_answered(store: HistoryStore, capfd: pytest.CaptureFixture[str]) -> None:
    number = store.create("fake").number
    store.add_message(number, Message("user", "count"), "fake", {})
    repl, state = start("")
    repl._conversations.show_resumed()
    assert "[not answered; /retry answers it]" in capfd.readouterr().err
    handle(repl, "/retry")
    assert texts(state) == ["count", "The answer."]


def test_calls_of_tools_that_were_killed_get_a_result(store: HistoryStore) -> None:
    calls = [ToolCall(f"functions.add:{index}", "add", "{}") for index in range(2)]
    number = store.create("fake").number
    for message in (
        Message("user", "add"),
        Message("assistant", "", tool_calls=calls),
        Message("tool", "3", tool_call_id=calls[0].id),
    ):
        store.add_message(number, message, "fake", {})
    _, state = start("")
    assert state.conversation.messages[3:] == [Message("tool", NO_RESULT, tool_call_id=calls[1].id)]
    assert [item.message for item in store.messages(number)] == state.conversation.messages


def test_another_conversation_is_continued(store: HistoryStore, capfd: pytest.CaptureFixture[str]) -> None:
    repl, state = start()
    for typed in ("What is MLX?", "/clear", "Tell me a joke", "/continue"):
        assert handle(repl, typed)
    assert texts(state) == ["What is MLX?", "The answer."]
    first = store.conversations()[1]
    assert not handle(repl, "/continue mlx")
    assert "is this conversation" in capfd.readouterr().err
    assert handle(repl, "/continue joke")
    handle(repl, "more")
    assert stored(store)[0] == ["Tell me a joke", "The answer.", "more", "The answer."]
    assert handle(repl, f"/continue {first.id[:6]}")
    capfd.readouterr()
    assert handle(repl, "/history")
    assert handle(repl, "/history joke more")
    shown = capfd.readouterr().err
    assert "Tell me a joke" in shown
    assert first.id in shown
    handle(repl, "/continue nothing")
    assert "there is no conversation `nothing`" in capfd.readouterr().err
    command = repl.command_list.find("/continue")
    assert command.complete is not None
    assert list(command.complete(first.id[:4])) == [first.id]


def test_save_and_load(tmp_path: Path, store: HistoryStore, capfd: pytest.CaptureFixture[str]) -> None:
    repl, state = start()
    path = tmp_path / "a chat.json"
    assert not handle(repl, f"/save {path}")
    state.conversation.system = "Be brief."
    handle(repl, "first")
    assert not handle(repl, "/save")
    assert handle(repl, f"/save {path}")
    saved = json.loads(path.read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    handle(repl, "second")
    assert not handle(repl, f"/save {path}")
    assert json.loads(path.read_text()) == saved
    assert "press Enter again to replace it" in capfd.readouterr().err
    assert handle(repl, f"/save {path}")
    assert len(json.loads(path.read_text())["messages"]) == 5
    path.write_text(json.dumps({**saved, "title": "My title"}))
    assert handle(repl, f"/load {path}")
    handle(repl, "third")
    assert texts(state) == ["first", "The answer.", "third", "The answer."]
    assert stored(store) == [texts(state), ["first", "The answer.", "second", "The answer."]]
    assert store.conversations()[0].title == "My title"


@pytest.mark.parametrize("text", ["", "{", '{"messages": [{"role": "robot"}]}', "[" * 100_000, '["\\ud800"]', "5"])
def test_a_file_that_cannot_be_loaded_changes_nothing(tmp_path: Path, store: HistoryStore, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    repl, state = start()
    handle(repl, "first")
    assert not handle(repl, f"/load {path}")
    assert not handle(repl, f"/load {tmp_path / 'missing.json'}")
    assert not handle(repl, "/load")
    handle(repl, "second")
    assert texts(state) == ["first", "The answer.", "second", "The answer."]
    assert stored(store) == [texts(state)]


def test_export(tmp_path: Path) -> None:
    repl, _ = start()
    handle(repl, "first")
    assert handle(repl, f"/export {tmp_path / 'chat'}")
    assert "## You\n\nfirst\n\n## fake\n\n> \n" not in (tmp_path / "chat.md").read_text()
    assert "## You\n\nfirst\n\n## fake\n\n" in (tmp_path / "chat.md").read_text()


def test_a_chat_that_is_not_stored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    repl, state = start(is_logged=False)
    handle(repl, "first")
    for typed in ("/title x", "/fork", "/load x.json", "/continue"):
        assert not handle(repl, typed)
    assert "not stored in the history" in capfd.readouterr().err
    assert not (tmp_path / "data" / "kimi-mlx" / "conversations").exists() or open_history().conversations() == []
    assert handle(repl, f"/save {tmp_path / 'chat.json'}")
    assert handle(repl, f"/export {tmp_path / 'chat.md'}")
    assert [message["role"] for message in json.loads((tmp_path / "chat.json").read_text())["messages"]] == [
        "user",
        "assistant",
    ]
    assert not handle(repl, f"/load {tmp_path / 'chat.json'}")
    assert handle(repl, "/clear")
    assert handle(repl, f"/load {tmp_path / 'chat.json'}")
    assert texts(state) == ["first", "The answer."]


def test_a_stored_conversation_is_continued_without_storing(store: HistoryStore) -> None:
    repl, state = start()
    handle(repl, "first")
    state.history.close()
    repl, state = start("first", is_logged=False)
    handle(repl, "second")
    assert texts(state) == ["first", "The answer.", "second", "The answer."]
    assert stored(store) == [["first", "The answer."]]


def test_a_broken_history_is_reported_and_the_chat_continues(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data" / "kimi-mlx" / "conversations"
    folder.mkdir(parents=True)
    (folder / "history.sqlite3").write_bytes(b"not a database" * 1000)
    repl, state = start()
    assert handle(repl, "first")
    assert texts(state) == ["first", "The answer."]
    shown = capfd.readouterr().err
    assert shown.count("this chat is not stored") == 1
    assert "file is not a database" in shown.replace("\n", " ")


def test_an_error_of_the_log_stands_in_its_own_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    repl, state = start()
    handle(repl, "first")
    state.history.store._connection.execute("PRAGMA max_page_count = 1")  # SQLite's error of a full disk
    state.conversation.model = conversation_of("word " * 5000).model
    handle(repl, "second")
    handle(repl, "third")
    shown = capfd.readouterr().err
    assert shown.count("this conversation is no longer stored") == 1
    assert "database or disk is full" in shown.replace("\n", " ")
    assert len(state.conversation.messages) == 6
    assert not handle(repl, f"/load {tmp_path / 'chat.json'}")

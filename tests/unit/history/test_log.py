"""The log of a chat: what is in the history after each event, and what errors do."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing

import pytest

from kimi_mlx.errors import HistoryError
from kimi_mlx.history.find import find_conversation
from kimi_mlx.history.log import ConversationLog
from kimi_mlx.history.store import HistoryStore
from kimi_mlx.session.conversation import ConversationListener
from kimi_mlx.text.messages import Delta, Message, ToolCall, ToolCallDelta
from tests.fakes import conversation_of
from tests.unit.history.conftest import SETTINGS, finished

OpenLog = Callable[[], ConversationLog]


def contents(store: HistoryStore, with_removed: bool = False) -> list[object]:
    return [record.message.content for record in store.messages(find_conversation(store).number, with_removed)]


def test_a_log_is_a_listener_of_conversations(log: ConversationLog) -> None:
    listener: ConversationListener = log
    conversation = conversation_of("The answer.")
    conversation.listener = listener
    list(conversation.ask("Hello"))
    records = log.store.messages(find_conversation(log.store).number)
    assert [record.message for record in records] == conversation.messages
    assert [record.model for record in records] == ["kimi-mini"] * 2
    assert records[1].settings == SETTINGS
    assert records[1].finish_reason == "stop"
    assert records[1].statistics is not None
    assert records[1].statistics["generated_tokens"] > 0


def test_each_delta_is_stored_before_the_next_event(log: ConversationLog, store: HistoryStore) -> None:
    conversation = conversation_of("one two three")
    conversation.listener = log
    shown = ""
    for event in conversation.ask("count"):
        if isinstance(event, Delta):
            shown += event.text
            with closing(HistoryStore.open(store.path.parent)) as other:  # as another process would read it
                assert other.messages(1)[-1].message.content == shown
    assert shown == "one two three"


def test_an_answer_without_an_end_is_unfinished(log: ConversationLog, store: HistoryStore) -> None:
    log.on_message(Message("user", "count"))
    log.on_delta(Delta("one ", "thinking "))
    log.on_delta(Delta("two", "", tool_call_deltas=(ToolCallDelta(0, "functions.add:0", "add", '{"a": '),)))
    record = store.messages(1)[-1]
    assert record.is_unfinished
    assert (record.message.content, record.message.reasoning_content) == ("one two", "thinking ")
    assert record.unfinished_calls == 'add {"a": '
    messages, is_copy = log.resume(1)
    assert (len(messages), is_copy) == (2, False)


def test_an_unfinished_answer_without_text_is_removed_when_it_is_continued(
    log: ConversationLog, store: HistoryStore, open_log: OpenLog
) -> None:
    log.on_message(Message("user", "add"))
    log.on_delta(Delta(tool_call_deltas=(ToolCallDelta(0, "functions.add:0", "add", "{"),)))
    messages, _ = open_log().resume(1)
    assert [record.message.content for record in messages] == ["add"]
    assert contents(store) == ["add"]


def test_a_failed_answer_keeps_its_text(log: ConversationLog, store: HistoryStore) -> None:
    answer = Message("assistant", "one")
    log.on_message(Message("user", "count"))
    log.on_delta(Delta("one"))
    log.on_message(answer)
    log.on_finish(None, answer)
    assert contents(store) == ["count", "one"]
    assert store.messages(1)[-1].is_unfinished


def test_a_failed_answer_without_text_leaves_no_message(log: ConversationLog, store: HistoryStore) -> None:
    log.on_message(Message("user", "count"))
    log.on_delta(Delta(tool_call_deltas=(ToolCallDelta(0, "functions.add:0", "add", "{"),)))
    log.on_finish(None, None)
    log.on_remove(1)
    assert contents(store) == []
    assert len(contents(store, with_removed=True)) == 2


def test_undo_and_retry_mark_what_they_remove(log: ConversationLog, store: HistoryStore) -> None:
    conversation = conversation_of("The answer.")
    conversation.listener = log
    list(conversation.ask("first"))
    list(conversation.ask("second"))
    assert conversation.undo() == "second"
    list(conversation.retry())
    assert contents(store) == ["first", "The answer."]
    assert contents(store, with_removed=True) == ["first", "The answer.", "second", "The answer.", "The answer."]
    assert [record.message for record in store.messages(1)] == conversation.messages


def test_a_retry_that_fails_restores_the_answer(log: ConversationLog, store: HistoryStore) -> None:
    conversation = conversation_of("The answer.")
    conversation.listener = log
    list(conversation.ask("first"))
    model, failing = conversation.model, conversation_of("")
    for _ in range(2):
        conversation.model = failing.model
        events = conversation.retry()
        next(events)
        events.close()  # before it has content
        assert contents(store) == ["first", "The answer."]
        conversation.model = model
        list(conversation.retry())
        assert [record.message for record in store.messages(1)] == conversation.messages
        assert not store.messages(1)[-1].is_unfinished


def test_a_reset_begins_a_new_conversation(log: ConversationLog, store: HistoryStore) -> None:
    conversation = conversation_of("The answer.")
    conversation.listener = log
    list(conversation.ask("first"))
    conversation.reset()
    list(conversation.ask("second"))
    assert [item.title for item in store.conversations()] == ["second", "first"]


def test_tools_and_images(log: ConversationLog, store: HistoryStore) -> None:
    call = ToolCall("functions.add:0", "add", '{"a": 1}')
    image = {"type": "image", "image": b"pixels"}
    messages = [
        Message("user", [image, {"type": "text", "text": "add"}]),
        Message("assistant", "", "hm", (call,)),
        Message("tool", "3", tool_call_id=call.id),
        Message("user", [image]),
    ]
    log.add_messages(messages)
    assert [record.message for record in store.messages(1)] == messages
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM media").fetchone() == (1,)
    connection.close()


def test_a_replaced_message(log: ConversationLog, store: HistoryStore) -> None:
    conversation = conversation_of("The answer.")
    text = {"type": "text", "text": "What is it?"}
    conversation.messages = [Message("user", "before"), Message("user", [{"type": "image", "image": b"pixels"}, text])]
    log.add_messages(conversation.messages)
    conversation.listener = log
    conversation.remove_part(conversation.media_parts[0])
    assert contents(store) == ["before", [text]]


def test_an_error_is_reported_once_and_the_chat_continues(
    log: ConversationLog, store: HistoryStore, warnings: list[str]
) -> None:
    conversation = conversation_of("The answer.")
    conversation.listener = log
    list(conversation.ask("first"))
    store._connection.execute("PRAGMA max_page_count = 1")  # SQLite's error of a full disk
    list(conversation.ask("second" * 10000))
    list(conversation.ask("third"))
    assert len(conversation.messages) == 6
    assert len(warnings) == 1
    assert "database or disk is full" in warnings[0]
    assert "free some space" in warnings[0]
    with pytest.raises(HistoryError, match="not in the history"):
        log.rename("title")


def test_slow_writes_are_batched(log: ConversationLog, store: HistoryStore) -> None:
    log.on_message(Message("user", "count"))
    log.on_delta(Delta("one "))
    log._write_s = 10.0
    for text in ("two ", "three ", "four"):
        log.on_delta(Delta(text))
    assert store.messages(1)[-1].message.content == "one two "
    answer = Message("assistant", "one two three four")
    log.on_message(answer)
    log.on_finish(finished(), answer)
    assert store.messages(1)[-1].message == answer


def test_a_fork_leaves_the_original(log: ConversationLog, store: HistoryStore) -> None:
    log.on_message(Message("user", [{"type": "image", "image": b"pixels"}]))
    log.on_delta(Delta("A cat"))
    copy = log.fork()
    log.on_message(Message("user", "second"))
    assert copy.parent == store.conversation(1).id
    assert [len(store.messages(number)) for number in (1, copy.number)] == [2, 3]
    assert store.messages(copy.number)[:2] == store.messages(1)


def test_a_conversation_that_another_process_has_open_is_copied(
    log: ConversationLog, store: HistoryStore, open_log: OpenLog
) -> None:
    log.on_message(Message("user", "count"))
    script = (
        "import sys; from pathlib import Path; from kimi_mlx.history.store import HistoryStore\n"
        "store = HistoryStore.open(Path(sys.argv[1])); print(store.acquire(1)); store.release(1)\n"
    )
    folder = str(store.path.parent)
    run = [sys.executable, "-c", script, folder]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "False\n"
    log.start()
    holder = subprocess.Popen(
        [sys.executable, "-c", script.replace("; store.release(1)", "", 1) + "input()", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "True\n"
        other = open_log()
        messages, is_copy = other.resume(1)
        assert is_copy
        assert [record.message.content for record in messages] == ["count"]
        assert other.conversation is not None
        assert other.conversation.parent == store.conversation(1).id
        holder.kill()
    assert not open_log().resume(1)[1]


def test_a_title_is_made_of_the_first_words(log: ConversationLog, store: HistoryStore) -> None:
    log.on_message(Message("user", "What is\nthe answer to " + "x" * 80 + "?"))
    assert store.conversation(1).title == "What is the answer to ..."
    log.on_remove(1)
    log.on_message(Message("user", "漢字" * 40))
    assert store.conversation(1).title == "漢字" * 30 + " ..."
    image, file = {"type": "image", "image": b"pixels"}, {"type": "text", "text": "notes.txt\n..."}
    for content, title in (
        ([image, file, {"type": "text", "text": "What is it?"}], "What is it?"),
        ([image], "[image]"),
        ("File: a.py\n```\npass\n```\n\nFile: b\n````\n```\n````\n\nWhat is it?", "What is it?"),
        ("File: a.py\n```\npass\n```", "File: a.py ``` pass ```"),
    ):
        log.on_remove(1)
        log.on_message(Message("user", content))
        assert store.conversation(1).title == title
    log.rename("my title")
    log.on_remove(1)
    log.on_message(Message("user", "another"))
    assert store.conversation(1).title == "my title"


def test_text_that_utf_8_cannot_encode(log: ConversationLog, store: HistoryStore) -> None:
    log.on_message(Message("user", "half \ud800 \0 of a pair"))
    log.on_delta(Delta("and \udfff another"))
    assert contents(store) == ["half \ud800 \0 of a pair", "and \udfff another"]
    log.rename("\ud800")
    assert store.conversation(1).title == "?"

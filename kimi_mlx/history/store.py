"""The conversations and messages in the file of the history."""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kimi_mlx.errors import HistoryError, TextError
from kimi_mlx.history.answer_parts import answer_of, delta_to_json
from kimi_mlx.history.database import (
    FILE_NAME,
    broken_file_hint,
    connect,
    history_errors,
    history_folder,
    to_history_error,
    transaction,
)
from kimi_mlx.history.json_text import to_json
from kimi_mlx.history.locks import ConversationLocks
from kimi_mlx.history.media import put_contents, take_contents
from kimi_mlx.history.plain_text import title_of
from kimi_mlx.history.records import ConversationRecord, MessageRecord, read_settings
from kimi_mlx.text.messages import Delta, Message

ID_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"
"""Digits and letters that cannot be mistaken for each other."""
ID_LENGTH = 8

CONVERSATIONS = """
    SELECT number, id, title, model, parent, created_s, updated_s, (
        SELECT COUNT(*) FROM messages
        WHERE conversation = conversations.number AND role = 'user' AND removed_s IS NULL
    ) FROM conversations
"""
MESSAGES = """
    SELECT messages.number, messages.document, model, settings.document, finish_reason, statistics,
        created_s, finished_s, removed_s
    FROM messages LEFT JOIN settings ON settings.number = messages.settings
    WHERE conversation = ? AND (? OR removed_s IS NULL) ORDER BY messages.number
"""


class HistoryStore:
    """The history of a user. Several processes may use it at once; each method is one transaction.

    All methods raise HistoryError if the file cannot be used.

    Args:
        connection: open file.
        path: its location.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path):
        self._connection = connection
        self.path = path
        self._locks = ConversationLocks(path.parent)

    @classmethod
    def open(cls, folder: Path) -> HistoryStore:
        """Open the history in a folder, and create it if there is none.

        Raises:
            HistoryError: the file cannot be used, is broken, or belongs to a newer version of kimi-mlx.
        """
        return cls(connect(folder), folder / FILE_NAME)

    def close(self) -> None:
        """Close the file and release all conversations."""
        self._connection.close()
        self._locks.close()

    def acquire(self, number: int) -> bool:
        """Reserve a conversation for this process; return False if another process has reserved it."""
        return self._locks.acquire(number)

    def release(self, number: int) -> None:
        """End the reservation of a conversation."""
        self._locks.release(number)

    def create(self, model: str) -> ConversationRecord:
        """Add an empty conversation, reserve it, and return it."""
        with self._transaction():
            return self._conversation(self._create(model, "", None))

    def fork(self, number: int) -> ConversationRecord:
        """Copy a conversation without its removed messages, reserve the copy, and return it."""
        messages = self.messages(number)
        with self._transaction():
            original = self._conversation(number)
            copy = self._create(original.model, original.title, original.id)
            for message in messages:
                self._add(copy, message)
            return self._conversation(copy)

    def add_message(self, number: int, message: Message, model: str, settings: Mapping[str, Any]) -> int:
        """Append a complete message to a conversation, and return its key.

        Args:
            number: key of the conversation.
            message: message; its images and videos hold their bytes in the place of a URL.
            model: name of the model.
            settings: settings of the conversation, for JSON.
        """
        now = time.time()
        with self._transaction():
            added = self._add(number, MessageRecord(message, model, settings, None, None, now, now, None))
            self._set_changed(number, model, now)
            if message.role == "user":
                self._connection.execute(
                    "UPDATE conversations SET title = ? WHERE number = ? AND is_named = 0 AND NOT EXISTS (SELECT 1 "
                    "FROM messages WHERE conversation = ?2 AND role = 'user' AND removed_s IS NULL LIMIT 1 OFFSET 1)",
                    (_storable(title_of(message.content)), number),
                )
            return added

    def begin_answer(self, number: int, model: str, settings: Mapping[str, Any]) -> int:
        """Append an unfinished answer to a conversation, and return its key."""
        now = time.time()
        with self._transaction():
            self._set_changed(number, model, now)
            return self._insert(
                "INSERT INTO messages (conversation, role, model, settings, created_s) VALUES (?, ?, ?, ?, ?)",
                (number, "assistant", model, self._settings_number(settings), now),
            )

    def add_delta(self, answer: int, index: int, delta: Delta) -> None:
        """Append text to an unfinished answer. This runs once per token, so it has no context manager.

        Args:
            answer: key of the answer.
            index: number of the delta, from 0.
            delta: new text, reasoning, or tool calls.
        """
        try:
            self._connection.execute("INSERT INTO deltas VALUES (?, ?, ?)", (answer, index, delta_to_json(delta)))
        except sqlite3.Error as error:
            raise to_history_error(error, self.path) from error

    def set_answer(self, answer: int, message: Message) -> None:
        """Replace the deltas of an unfinished answer by its message.

        Args:
            answer: key of the answer.
            message: all that the model has written.
        """
        with self._transaction():
            self._set_document(answer, message)
            self._connection.execute("DELETE FROM deltas WHERE message = ?", (answer,))

    def finish_answer(self, answer: int, reason: str, statistics: Mapping[str, Any]) -> None:
        """Record the end of an answer.

        Args:
            answer: key of the answer.
            reason: reason for the end.
            statistics: statistics, for JSON.
        """
        with self._transaction():
            self._connection.execute(
                "UPDATE messages SET finish_reason = ?, statistics = ?, finished_s = ? WHERE number = ?",
                (reason, to_json(statistics), time.time(), answer),
            )

    def replace_message(self, number: int, index: int, message: Message) -> None:
        """Replace a message of a conversation.

        Args:
            number: key of the conversation.
            index: index of the message among those that were not removed.
            message: new message.
        """
        with self._transaction():
            row = self._connection.execute(
                "SELECT number FROM messages WHERE conversation = ? AND removed_s IS NULL ORDER BY number "
                "LIMIT 1 OFFSET ?",
                (number, index),
            ).fetchone()
            if row is not None:
                self._set_document(row[0], message)

    def remove_last(self, number: int, count: int) -> None:
        """Mark the last messages of a conversation as removed. They stay in the file.

        Args:
            number: key of the conversation.
            count: number of messages.
        """
        now = time.time()
        with self._transaction():
            self._connection.execute(
                "UPDATE messages SET removed_s = ? WHERE number IN (SELECT number FROM messages "
                "WHERE conversation = ? AND removed_s IS NULL ORDER BY number DESC LIMIT ?)",
                (now, number, count),
            )
            self._connection.execute("UPDATE conversations SET updated_s = ? WHERE number = ?", (now, number))

    def rename(self, number: int, title: str) -> None:
        """Set the title of a conversation."""
        with self._transaction():
            self._connection.execute(
                "UPDATE conversations SET title = ?, is_named = 1 WHERE number = ?", (_storable(title), number)
            )

    def erase(self, numbers: Sequence[int]) -> None:
        """Delete conversations with their messages, and the images that no other message has.

        SQLite overwrites deleted rows with zeros. Then the file is rebuilt without them, and its write-ahead log is
        emptied.

        Raises:
            HistoryError: the file cannot be written; or the rows are deleted, but other processes keep the file from
                being rebuilt.
        """
        with self._transaction():
            for number in numbers:
                self._connection.execute("DELETE FROM conversations WHERE number = ?", (number,))
            for table, key, used_by in (
                ("media", "sha256", "SELECT sha256 FROM media_of_messages"),
                ("settings", "number", "SELECT settings FROM messages WHERE settings IS NOT NULL"),
            ):
                self._connection.execute(f"DELETE FROM {table} WHERE {key} NOT IN ({used_by})")
        with history_errors(self.path):
            self._connection.execute("VACUUM")
            is_blocked, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if is_blocked:
            raise HistoryError(
                f"the conversations are deleted, but another process keeps `{self.path}-wal` from being emptied",
                hint="close other chats, and type `kimi-mlx history rm` for another conversation",
            )

    def conversations(self, limit: int | None = None) -> list[ConversationRecord]:
        """Return the conversations, latest first."""
        with history_errors(self.path):
            rows = self._connection.execute(
                f"{CONVERSATIONS} ORDER BY updated_s DESC, number DESC LIMIT ?", (-1 if limit is None else limit,)
            ).fetchall()
        return [ConversationRecord(*row) for row in rows]

    def conversation(self, number: int) -> ConversationRecord:
        """Return a conversation.

        Raises:
            HistoryError: it was deleted.
        """
        with history_errors(self.path):
            return self._conversation(number)

    def messages(self, number: int, with_removed: bool = False) -> list[MessageRecord]:
        """Return the messages of a conversation, in order.

        Args:
            number: key of the conversation.
            with_removed: whether to include the messages that `/undo` or `/retry` removed.
        """
        with history_errors(self.path):
            rows = self._connection.execute(MESSAGES, (number, with_removed)).fetchall()
            return [self._message(*row) for row in rows]

    def messages_with(self, number: int, words: Sequence[str]) -> list[MessageRecord]:
        """Return the messages of a conversation that may contain all words. Unfinished answers are always included.

        Args:
            number: key of the conversation.
            words: words in lower case (`str.casefold`), with the escapes of JSON.
        """
        with history_errors(self.path):
            rows = self._connection.execute(MESSAGES, (number, False)).fetchall()
            return [self._message(*row) for row in rows if row[1] is None or _may_have(row[1], words)]

    @contextmanager
    def _transaction(self) -> Generator[None]:
        with history_errors(self.path), transaction(self._connection):
            yield

    def _insert(self, statement: str, values: Sequence[Any]) -> int:
        """Execute an INSERT, and return the key of the row."""
        number = self._connection.execute(statement, values).lastrowid
        assert number is not None
        return number

    def _create(self, model: str, title: str, parent: str | None) -> int:
        now = time.time()
        name = "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
        number = self._insert(
            "INSERT INTO conversations (id, title, model, parent, created_s, updated_s) VALUES (?, ?, ?, ?, ?, ?)",
            (name, title, model, parent, now, now),
        )
        self.acquire(number)
        return number

    def _add(self, number: int, record: MessageRecord) -> int:
        """Insert a message, and return its key."""
        statistics = None if record.statistics is None else to_json(record.statistics)
        added = self._insert(
            "INSERT INTO messages (conversation, role, model, settings, finish_reason, statistics, created_s, "
            "finished_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(number, record.message.role, record.model, self._settings_number(record.settings)),
                *(record.finish_reason, statistics, record.created_s, record.finished_s),
            ),
        )
        self._set_document(added, record.message)
        return added

    def _set_document(self, number: int, message: Message) -> None:
        """Write the content of a message, and the contents of its images and videos."""
        document, contents = take_contents(message.to_dict())
        self._connection.execute("UPDATE messages SET document = ? WHERE number = ?", (to_json(document), number))
        self._connection.execute("DELETE FROM media_of_messages WHERE message = ?", (number,))
        for sha256, data in contents.items():
            self._connection.execute("INSERT OR IGNORE INTO media VALUES (?, ?)", (sha256, data))
            self._connection.execute("INSERT INTO media_of_messages VALUES (?, ?)", (number, sha256))

    def _settings_number(self, settings: Mapping[str, Any]) -> int:
        """Return the key of settings, which are stored once."""
        document = to_json(settings)
        sha256 = hashlib.sha256(document.encode()).hexdigest()
        self._connection.execute("INSERT OR IGNORE INTO settings (sha256, document) VALUES (?, ?)", (sha256, document))
        return self._connection.execute("SELECT number FROM settings WHERE sha256 = ?", (sha256,)).fetchone()[0]

    def _set_changed(self, number: int, model: str, now: float) -> None:
        self._connection.execute(
            "UPDATE conversations SET model = ?, updated_s = ? WHERE number = ?", (model, now, number)
        )

    def _conversation(self, number: int) -> ConversationRecord:
        row = self._connection.execute(f"{CONVERSATIONS} WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise HistoryError("the conversation was removed from the history")
        return ConversationRecord(*row)

    def _message(
        self,
        number: int,
        document: str | None,
        model: str,
        settings: str | None,
        finish_reason: str | None,
        statistics: str | None,
        *times: float | None,
    ) -> MessageRecord:
        created_s, finished_s, removed_s = times
        assert created_s is not None
        unfinished_calls = ""
        try:
            if document is None:
                query = "SELECT document FROM deltas WHERE message = ? ORDER BY number"
                rows = self._connection.execute(query, (number,))
                message, unfinished_calls = answer_of(row[0] for row in rows)
            else:
                message = Message.from_dict(put_contents(json.loads(document), self._contents))
            stored_settings = read_settings(settings)
            stored_statistics = None if statistics is None else dict(json.loads(statistics))
        except (TextError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            hint = broken_file_hint(self.path)
            raise HistoryError(f"message {number} in `{self.path}` is damaged: {error!s:.200}", hint=hint) from error
        return MessageRecord(
            message,
            model,
            stored_settings,
            finish_reason,
            stored_statistics,
            created_s,
            finished_s,
            removed_s,
            unfinished_calls,
        )

    def _contents(self, sha256: str) -> bytes | None:
        row = self._connection.execute("SELECT contents FROM media WHERE sha256 = ?", (sha256,)).fetchone()
        return None if row is None else row[0]


def open_history() -> HistoryStore:
    """Open the history of the user.

    Raises:
        HistoryError: it cannot be used.
    """
    folder = history_folder()
    if folder is None:
        raise HistoryError("the user has no home folder for the history", hint="set XDG_DATA_HOME to a folder")
    return HistoryStore.open(folder)


def _may_have(document: str, words: Sequence[str]) -> bool:
    folded = document.casefold()
    return "\\u" in folded or all(word in folded for word in words)


def _storable(text: str) -> str:
    """Return a text without lone surrogates, which SQLite cannot store."""
    return text.encode(errors="replace").decode()

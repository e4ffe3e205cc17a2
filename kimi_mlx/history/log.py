"""The log of a chat: writes each message, and each delta of an answer, before it is shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kimi_mlx.engine.events import Finished
from kimi_mlx.errors import HistoryError
from kimi_mlx.history.plain_text import has_content
from kimi_mlx.history.records import ConversationRecord, MessageRecord
from kimi_mlx.history.store import HistoryStore
from kimi_mlx.text.messages import Delta, Message

SLOW_WRITE_S, BATCH_S = 0.05, 1.0
"""If a write takes longer than SLOW_WRITE_S on average, text is written at most every BATCH_S.

Writes of several chats wait for each other, for some milliseconds; only a disk without SQLite's write-ahead log, such
as one in the network, is slower.
"""


class ConversationLog:
    """Writes a conversation to the history while it happens: a ConversationListener of the package `session`.

    The first message creates the conversation in the history. The first error is reported; after it nothing is written,
    and the chat continues.

    Args:
        store: history.
        model: name of the model.
        settings: function that returns the settings of the conversation at this time, for JSON.
        warn: function that shows a message to the user.

    Attributes:
        has_failed: whether an error has stopped the log.
    """

    def __init__(
        self,
        store: HistoryStore,
        model: str,
        settings: Callable[[], Mapping[str, Any]],
        warn: Callable[[str], None],
    ):
        self.store = store
        self.model = model
        self._settings = settings
        self._warn = warn
        self._number: int | None = None
        self.has_failed = False
        self._answer: int | None = None  # key of the answer in progress
        self._num_deltas = 0
        self._unwritten = Delta()
        self._write_s = 0.0  # duration of a write, moving average
        self._next_write_s = 0.0

    @property
    def conversation(self) -> ConversationRecord | None:
        """The conversation in the history; None before its first message.

        Raises:
            HistoryError: the history cannot be used, or an error has stopped the log.
        """
        self._require()
        return None if self._number is None else self.store.conversation(self._number)

    def resume(self, number: int) -> tuple[list[MessageRecord], bool]:
        """Continue a conversation of the history. If another process has it open, continue a copy.

        An answer at its end that has neither text nor reasoning is removed.

        Args:
            number: key of the conversation.

        Returns:
            The messages, and whether it is a copy.

        Raises:
            HistoryError: the conversation cannot be read or copied.
        """
        self._require()
        is_copy = number != self._number and not self.store.acquire(number)
        if is_copy:
            number = self.store.fork(number).number
        messages = self.store.messages(number)
        if messages and messages[-1].is_unfinished and not has_content(messages[-1].message):
            self.store.remove_last(number, 1)
            del messages[-1]
        if number != self._number:
            self.start()
            self._number = number
        return messages, is_copy

    def start(self) -> None:
        """Begin a new conversation with the next message; the current one stays in the history."""
        if self._number is not None:
            self.store.release(self._number)
        self._number = self._answer = None
        self._unwritten = Delta()

    def fork(self) -> ConversationRecord:
        """Continue with a copy of the conversation; the original does not change.

        Raises:
            HistoryError: there is no message yet, or the history cannot be written.
        """
        number = self._require_conversation()
        copy = self.store.fork(number)
        self.store.release(number)
        self._number, self._answer = copy.number, None
        return copy

    def rename(self, title: str) -> None:
        """Give the conversation a title.

        Raises:
            HistoryError: there is no message yet, or the history cannot be written.
        """
        self.store.rename(self._require_conversation(), title)

    def add_messages(self, messages: Sequence[Message]) -> None:
        """Append messages that do not come from this chat, such as those of a file."""
        for message in messages:
            self.on_message(message)
        self._answer = None

    def on_message(self, message: Message) -> None:
        """Append a message of the user or of a tool, or complete the answer in progress."""
        with self._errors_stop_the_log() as is_written:
            if not is_written:
                return
            if message.role == "assistant" and self._answer is not None:
                self._unwritten = Delta()
                self.store.set_answer(self._answer, message)
                return
            number = self._open_conversation()
            added = self.store.add_message(number, message, self.model, self._settings())
            self._answer = added if message.role == "assistant" else None

    def on_delta(self, delta: Delta) -> None:
        """Append a delta of the answer in progress. This runs once per token, so it has no context managers."""
        if self.has_failed:
            return
        try:
            if self._answer is None:
                self._answer = self.store.begin_answer(self._open_conversation(), self.model, self._settings())
                self._num_deltas = 0
            self._unwritten = self._unwritten + delta if self._unwritten else delta
            if self._next_write_s == 0.0 or time.monotonic() >= self._next_write_s:
                self._flush()
        except HistoryError as error:
            self._fail(error)

    def on_finish(self, finished: Finished | None, message: Message | None) -> None:
        """Record the end of the answer in progress; an answer without content is not part of the conversation."""
        with self._errors_stop_the_log() as is_written:
            if not is_written or self._answer is None:
                return
            self._flush()
            if message is None:
                self.store.remove_last(self._open_conversation(), 1)
            elif finished is not None:
                self.store.finish_answer(self._answer, finished.reason, finished.statistics.to_dict())
            self._answer = None

    def on_remove(self, count: int) -> None:
        """Mark messages at the end as removed: by `/undo` or `/retry`."""
        with self._errors_stop_the_log() as is_written:
            if is_written and self._number is not None:
                self._answer, self._unwritten = None, Delta()
                self.store.remove_last(self._number, count)

    def on_replace(self, index: int, message: Message) -> None:
        """Store a message that has changed."""
        with self._errors_stop_the_log() as is_written:
            if is_written and self._number is not None:
                self.store.replace_message(self._number, index, message)

    def on_reset(self) -> None:
        """Begin a new conversation."""
        self.start()

    def _open_conversation(self) -> int:
        if self._number is None:
            self._number = self.store.create(self.model).number
        return self._number

    def _flush(self) -> None:
        """Write the text that is not written yet."""
        if not self._unwritten or self._answer is None:
            return
        begin = time.monotonic()
        self.store.add_delta(self._answer, self._num_deltas, self._unwritten)
        end = time.monotonic()
        self._num_deltas += 1
        self._unwritten = Delta()
        self._write_s += (end - begin - self._write_s) / 8
        self._next_write_s = end + BATCH_S if self._write_s > SLOW_WRITE_S else 0.0

    def _require(self) -> None:
        if self.has_failed:
            raise HistoryError("this conversation is not in the history: an error has stopped its log")

    def _require_conversation(self) -> int:
        self._require()
        if self._number is None:
            raise HistoryError("the conversation has no messages yet", hint="send one first")
        return self._number

    @contextmanager
    def _errors_stop_the_log(self) -> Generator[bool]:
        """Report an error of the block, and stop the log; yield False if it has already stopped."""
        try:
            yield not self.has_failed
        except HistoryError as error:
            self._fail(error)

    def _fail(self, error: HistoryError) -> None:
        self.has_failed = True
        hint = f"; {error.hint}" if error.hint else ""
        self._warn(f"this conversation is no longer stored: {error.message}{hint}")

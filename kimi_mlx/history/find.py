"""Find a conversation by its id or title, and search the text of all messages.

The search reads every message: 100 MB of text take half a second. It has no index: that would have to be erased with
the messages, and SQLite's tokenizers (FTS5) find neither parts of words nor Chinese words of two characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kimi_mlx.errors import HistoryError
from kimi_mlx.history.plain_text import message_text
from kimi_mlx.history.records import ConversationRecord
from kimi_mlx.history.store import HistoryStore

MAX_CANDIDATES = 5
"""Number of conversations that the error of an ambiguous name lists."""
SNIPPET_BEFORE, SNIPPET_AFTER = 30, 90
"""Number of characters around the first match in a snippet."""


@dataclass(frozen=True)
class Match:
    """A conversation that has all words of a search in one message, or in its title.

    Attributes:
        conversation: the conversation.
        num_messages: number of messages with all words; 0 if only the title has them.
        role: role of the latest of these messages.
        snippet: text around its first match, in one line.
    """

    conversation: ConversationRecord
    num_messages: int
    role: str
    snippet: str


def find_conversation(store: HistoryStore, name: str = "") -> ConversationRecord:
    """Return a conversation of the history.

    Args:
        store: history.
        name: id, beginning of an id, title, or part of a title; empty for the latest conversation.

    Raises:
        HistoryError: there is none, or the name matches several.
    """
    if not name:
        latest = store.conversations(1)
        if not latest:
            raise HistoryError("there are no conversations yet", hint="type `kimi-mlx chat`")
        return latest[0]
    wanted = name.casefold()
    conversations = store.conversations()
    rules = (
        lambda item: item.id == wanted,
        lambda item: item.title.casefold() == wanted,
        lambda item: item.id.startswith(wanted),
        lambda item: wanted in item.title.casefold(),
    )
    for rule in rules:
        fitting = [item for item in conversations if rule(item)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise _ambiguous(name, fitting)
    raise HistoryError(f"there is no conversation `{name}`", hint="`kimi-mlx history` lists all ids and titles")


def search(store: HistoryStore, words: Sequence[str]) -> list[Match]:
    """Return the conversations with all words, latest first.

    Args:
        store: history.
        words: parts of words or phrases; case does not matter.
    """
    return list(_matches(store, [folded for word in words if (folded := _fold(word))]))


def _matches(store: HistoryStore, words: Sequence[str]) -> Iterator[Match]:
    escaped = [json.dumps(part, ensure_ascii=False)[1:-1] for word in words for part in word.split()]
    for conversation in store.conversations():
        number, role, snippet = 0, "", ""
        for record in store.messages_with(conversation.number, escaped):
            text = message_text(record.message)
            if _has_all(text, words):
                number, role, snippet = number + 1, record.message.role, _snippet(text, words)
        if number or _has_all(conversation.title, words):
            yield Match(conversation, number, role, snippet)


def _has_all(text: str, words: Sequence[str]) -> bool:
    folded = _fold(text)
    return all(word in folded for word in words)


def _fold(text: str) -> str:
    """Return a text in one line, and so that upper and lower case are equal."""
    return " ".join(text.casefold().split())


def _snippet(text: str, words: Sequence[str]) -> str:
    """Return the text around the first match, in one line."""
    line = " ".join(text.split())
    found = re.search("|".join(map(re.escape, words)), line, re.IGNORECASE)
    at = found.start() if found else 0
    begin, end = max(at - SNIPPET_BEFORE, 0), at + SNIPPET_AFTER
    return f"{'...' if begin else ''}{line[begin:end]}{'...' if end < len(line) else ''}"


def _ambiguous(name: str, fitting: Sequence[ConversationRecord]) -> HistoryError:
    listed = ", ".join(f"`{item.id}` ({item.title})" for item in fitting[:MAX_CANDIDATES])
    more = f", and {len(fitting) - MAX_CANDIDATES} more" if len(fitting) > MAX_CANDIDATES else ""
    return HistoryError(f"{len(fitting)} conversations match `{name}`: {listed}{more}", hint="type more of the id")

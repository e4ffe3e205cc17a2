"""What the history returns: conversations and their messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from kimi_mlx.text.messages import Message


@dataclass(frozen=True)
class ConversationRecord:
    """A conversation of the history, without its messages.

    Attributes:
        number: key in the file.
        id: name for people and commands: eight letters and digits.
        title: title that the user gave, else the first words.
        model: name of the model of the last message.
        parent: id of the conversation that this one is a copy of; None for an original.
        created_s: time of the first message, in seconds since 1970.
        updated_s: time of the last change.
        num_turns: number of messages of the user that were not removed.
    """

    number: int
    id: str
    title: str
    model: str
    parent: str | None
    created_s: float
    updated_s: float
    num_turns: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "id": self.id,
            "title": self.title,
            "model": self.model,
            "forked_from": self.parent,
            "created": self.created_s,
            "updated": self.updated_s,
            "turns": self.num_turns,
        }


SETTING_TYPES: Mapping[str, tuple[type, ...]] = {
    "system": (str,),
    "max_tokens": (int,),
    "sampling": (dict,),
    "template": (dict,),
}
"""Types of the stored settings that a continued conversation uses."""


def read_settings(document: str | None) -> Mapping[str, Any]:
    """Return stored settings; an empty mapping without any.

    Raises:
        ValueError: they are not JSON, or a setting has another type.
    """
    settings: Any = {} if document is None else json.loads(document)
    if not isinstance(settings, dict):
        raise ValueError("its settings are not an object")
    known = cast("dict[str, Any]", settings)
    for name, types in SETTING_TYPES.items():
        value = known.get(name)
        if value is not None and not isinstance(value, types):
            raise ValueError(f"its setting `{name}` is `{value!r:.60}`")
    return known


@dataclass(frozen=True)
class MessageRecord:
    """A message of the history.

    Attributes:
        message: the message. The text of an unfinished answer is what was shown.
        model: name of the model at that time.
        settings: system prompt, sampling and other settings at that time.
        finish_reason: reason for the end of an answer; None for other messages and unfinished answers.
        statistics: statistics of an answer.
        created_s: time of the message, or of the first token of an answer, in seconds since 1970.
        finished_s: time of the end of an answer; None if it is unfinished.
        removed_s: time at which `/undo` or `/retry` removed the message; None if it is part of the conversation.
        unfinished_calls: tool calls of an unfinished answer, as text; they were not run.
    """

    message: Message
    model: str
    settings: Mapping[str, Any]
    finish_reason: str | None
    statistics: Mapping[str, Any] | None
    created_s: float
    finished_s: float | None
    removed_s: float | None
    unfinished_calls: str = ""

    @property
    def is_unfinished(self) -> bool:
        """Whether the message is an answer without an end: the chat was killed, or the answer failed."""
        return self.finished_s is None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, without the message itself and its settings."""
        return {
            "model": self.model,
            "created": self.created_s,
            "finished": self.finished_s,
            "removed": self.removed_s,
            "finish_reason": self.finish_reason,
            "statistics": self.statistics,
        }

"""Messages, tool calls, and deltas of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeAlias, cast

from kimi_mlx.errors import TextError

ROLES = ("system", "user", "assistant", "tool")
# Text, or a list of parts as in OpenAI's API: {"type": "text", "text": ...} and others.
Content: TypeAlias = "str | Sequence[Mapping[str, Any]] | None"


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made.

    Args:
        id: id as the model wrote it, usually `functions.NAME:INDEX`; a tool result refers to it.
        name: name of the tool.
        arguments: arguments as the model wrote them: the JSON text of an object, or the text of a free-text tool.
    """

    id: str
    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """Return the call in OpenAI's format."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class UnparsedToolCall:
    """Text in the place of a tool call that is not a valid call.

    Args:
        raw: text between the markers of the call, including a marker inside it.
        reason: reason why it is not a call.
        index: index of its ToolCallDeltas; None if it had none, because it names no tool.
    """

    raw: str
    reason: str
    index: int | None = None


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of a tool call that the model is still writing. The call may still become an UnparsedToolCall.

    Args:
        index: index of the call in the answer, from 0.
        id: id as the model wrote it; empty except in the first delta of a call.
        name: name of the tool; empty except in the first delta of a call.
        arguments: next part of the JSON text.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """A part of an answer, from one or more tokens.

    Args:
        text: text of the answer.
        reasoning: text of the reasoning.
        tool_calls: completed calls, in order.
        tool_call_deltas: parts of the same calls, as the model writes them.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall | UnparsedToolCall, ...] = ()
    tool_call_deltas: tuple[ToolCallDelta, ...] = ()

    def __add__(self, other: Delta) -> Delta:
        """Return both deltas as one."""
        return join((self, other))

    def __bool__(self) -> bool:
        """Return whether the delta has any content."""
        return bool(self.text or self.reasoning or self.tool_calls or self.tool_call_deltas)


def join(deltas: Iterable[Delta]) -> Delta:
    """Return all deltas as one, with one ToolCallDelta per call."""
    all_deltas = list(deltas)
    call_deltas = [call_delta for delta in all_deltas for call_delta in delta.tool_call_deltas]
    calls = [list(group) for _, group in groupby(call_deltas, key=lambda call_delta: call_delta.index)]
    return Delta(
        "".join(delta.text for delta in all_deltas),
        "".join(delta.reasoning for delta in all_deltas),
        tuple(call for delta in all_deltas for call in delta.tool_calls),
        tuple(replace(call[0], arguments="".join(call_delta.arguments for call_delta in call)) for call in calls),
    )


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: text, or parts in OpenAI's format.
        reasoning_content: reasoning of the assistant before its answer.
        tool_calls: calls of the assistant.
        tool_call_id: id of the call that a tool message answers.
        name: name that the model sees instead of the role.

    Raises:
        TextError: the role is unknown.
    """

    role: str
    content: Content = ""
    reasoning_content: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Check the role."""
        if self.role not in ROLES:
            raise TextError(f"message has the role `{self.role}`", hint=f"use one of {', '.join(ROLES)}")

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Message:
        """Return a message from OpenAI's format. Arguments of tool calls may be JSON text or an object.

        Raises:
            TextError: a field has the wrong type.
        """
        content = value.get("content")
        if not isinstance(content, str | list | tuple | None):
            raise TextError(f"message content is neither a string nor a list: `{content!r:.60}`")
        return cls(
            role=_text(value, "role") or "",
            content=cast("Content", content),
            reasoning_content=_text(value, "reasoning_content"),
            tool_calls=tuple(_tool_call(call) for call in value.get("tool_calls") or ()),
            tool_call_id=_text(value, "tool_call_id"),
            name=_text(value, "name"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the message in OpenAI's format, for chat templates. Fields without a value are left out."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        optional = {
            "reasoning_content": self.reasoning_content,
            "tool_calls": [call.to_dict() for call in self.tool_calls],
            "tool_call_id": self.tool_call_id,
            "name": self.name,
        }
        return fields | {key: value for key, value in optional.items() if value}


def _text(value: Mapping[str, Any], key: str) -> str | None:
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise TextError(f"`{key}` of a message is not a string: `{text!r:.60}`")
    return text


def _tool_call(value: Any) -> ToolCall:
    try:
        function = value["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return ToolCall(id=str(value["id"]), name=str(function["name"]), arguments=arguments)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TextError(f"tool call is not in OpenAI's format: {error!r:.80}") from error

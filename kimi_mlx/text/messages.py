"""The values of a conversation: messages, tool calls, and the pieces of an answer as they arrive."""

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
        id: as the model wrote it, usually `functions.NAME:INDEX`; a tool result quotes it.
        name: the tool's name.
        arguments: the JSON text as the model wrote it; it holds an object.
    """

    id: str
    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """Return the call as OpenAI's API writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class UnparsedToolCall:
    """What stood in the place of a tool call and is none.

    Args:
        raw: the text between the call's markers, with the marker inside it if there was one.
        reason: why it is no call.
        index: that of its ToolCallDeltas; None if none were given, because nothing named a tool.
    """

    raw: str
    reason: str
    index: int | None = None


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call that is still being written: it may yet turn out to be none.

    Args:
        index: which of the answer's calls, from 0.
        id: as the model wrote it; in the first part of a call, else empty.
        name: the tool's name; in the first part of a call, else empty.
        arguments: the next piece of the JSON text.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: what one or more tokens added to it.

    Args:
        text: what is said.
        reasoning: what is thought.
        tool_calls: calls that have been closed, in the order of their parts.
        tool_call_deltas: pieces of calls, the same calls as they are being written.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall | UnparsedToolCall, ...] = ()
    tool_call_deltas: tuple[ToolCallDelta, ...] = ()

    def __add__(self, other: Delta) -> Delta:
        """Return both pieces as one."""
        return join((self, other))

    def __bool__(self) -> bool:
        """Tell whether there is anything in it."""
        return bool(self.text or self.reasoning or self.tool_calls or self.tool_call_deltas)


def join(deltas: Iterable[Delta]) -> Delta:
    """Return the pieces as one, with the parts of each call in one part."""
    pieces = list(deltas)
    parts = [part for piece in pieces for part in piece.tool_call_deltas]
    calls = [list(group) for _, group in groupby(parts, key=lambda part: part.index)]
    return Delta(
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        tuple(call for piece in pieces for call in piece.tool_calls),
        tuple(replace(call[0], arguments="".join(part.arguments for part in call)) for call in calls),
    )


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: text, or parts of it in OpenAI's shape.
        reasoning_content: what an assistant thought before it answered.
        tool_calls: the calls that an assistant made.
        tool_call_id: the call that a tool answers.
        name: shown to the model in place of the role.

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
        """Refuse a role that no chat template knows."""
        if self.role not in ROLES:
            raise TextError(f"message has the role `{self.role}`", hint=f"roles are {', '.join(ROLES)}")

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Message:
        """Read a message in OpenAI's shape; the arguments of tool calls may be JSON text or an object.

        Raises:
            TextError: a field has the wrong shape.
        """
        content = value.get("content")
        if not isinstance(content, str | list | tuple | None):
            raise TextError(f"message content is neither text nor a list: `{content!r:.60}`")
        return cls(
            role=_text(value, "role") or "",
            content=cast("Content", content),
            reasoning_content=_text(value, "reasoning_content"),
            tool_calls=tuple(_tool_call(call) for call in value.get("tool_calls") or ()),
            tool_call_id=_text(value, "tool_call_id"),
            name=_text(value, "name"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the message in OpenAI's shape, for chat templates; fields without a value are left out."""
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
        raise TextError(f"`{key}` of a message is not a text: `{text!r:.60}`")
    return text


def _tool_call(value: Any) -> ToolCall:
    try:
        function = value["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return ToolCall(id=str(value["id"]), name=str(function["name"]), arguments=arguments)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TextError(f"tool call is not in OpenAI's shape: {error!r:.80}") from error

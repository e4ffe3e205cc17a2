"""Ids of the tool calls of a conversation.

Kimi numbers the calls of a conversation from 0, as `functions.NAME:INDEX`, and its answers get worse if the prompt has
other ids. So all ids in a prompt are replaced by Kimi's, and a new call gets an id in the format of the conversation's
other ids: a client's, or Kimi's. Nothing is stored between answers: each one numbers the calls again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kimi_mlx.errors import CallIdError
from kimi_mlx.text.messages import Delta, Message, ToolCall, ToolCallDelta, UnparsedToolCall

KIMI_ID = re.compile(r"functions\..+:\d+")
PREFIX = re.compile(r"(?:[A-Za-z]+[_-])+")  # `call_`, `toolu_`, `chatcmpl-tool-`
DEFAULT_PREFIX = "call_"


@dataclass(frozen=True)
class CallIds:
    """The tool call ids of one conversation.

    Args:
        client_ids: ids that the client sent, in order.
        prefix: prefix of the ids of new calls; None uses Kimi's ids.
    """

    client_ids: tuple[str, ...] = ()
    prefix: str | None = None

    def allocator(self) -> CallIdAllocator:
        """Return an allocator for one new answer."""
        return CallIdAllocator(self)


def to_kimi_ids(
    messages: Sequence[Message], prefix: str | None = None, places: Sequence[str] = ()
) -> tuple[tuple[Message, ...], CallIds]:
    """Return the conversation with Kimi's ids, and the ids that the client used.

    Args:
        messages: conversation with ids in any format; an id may be reused once its call has a result.
        prefix: prefix of the ids of new calls if the conversation has no calls yet; None uses Kimi's ids.
        places: locations of the messages in the body; empty if they are `messages[0]` and so on.

    Raises:
        CallIdError: a result without a call, a second result, or two open calls with one id.
    """
    client_ids: list[str] = []
    open_calls: dict[str, str] = {}
    renamed: list[Message] = []
    for index, message in enumerate(messages):
        place = places[index] if places else f"messages[{index}]"
        calls: list[ToolCall] = []
        for call in message.tool_calls:
            if call.id in open_calls:
                raise CallIdError(place, f"two tool calls have the id `{call.id:.80}`, and the first has no result yet")
            open_calls[call.id] = f"functions.{call.name}:{len(client_ids)}"
            client_ids.append(call.id)
            calls.append(replace(call, id=open_calls[call.id]))
        call_id = message.tool_call_id
        if message.role == "tool":
            call_id = _close(call_id, open_calls, client_ids, place)
        renamed.append(replace(message, tool_calls=tuple(calls), tool_call_id=call_id))
    return tuple(renamed), CallIds(tuple(client_ids), _new_prefix(client_ids, prefix))


def _close(call_id: str | None, open_calls: dict[str, str], client_ids: Sequence[str], place: str) -> str:
    """Close the call that a result belongs to, and return its Kimi id."""
    if call_id is None:
        raise CallIdError(place, "a tool result has no tool call id")
    if call_id not in open_calls:
        problem = "already has a result" if call_id in client_ids else "does not appear before its result"
        raise CallIdError(place, f"the tool call `{call_id:.80}` {problem}")
    return open_calls.pop(call_id)


def _new_prefix(client_ids: Sequence[str], default: str | None) -> str | None:
    """Return the prefix for new ids: that of the newest one; None if that is one of Kimi's."""
    if not client_ids:
        return default
    if KIMI_ID.fullmatch(client_ids[-1]):
        return None
    match = PREFIX.match(client_ids[-1])
    return match.group() if match else DEFAULT_PREFIX


class CallIdAllocator:
    """Gives the calls of one answer ids in the client's format."""

    def __init__(self, ids: CallIds):
        self._prefix = ids.prefix
        self._used = set(ids.client_ids)
        self._next = len(ids.client_ids)
        self._assigned: list[str] = []  # by the index of the call
        self._num_closed = 0

    def assign(self, delta: Delta) -> Delta:
        """Return the next delta of the answer with the client's ids."""
        return replace(
            delta,
            tool_call_deltas=tuple(self._call_delta(part) for part in delta.tool_call_deltas),
            tool_calls=tuple(self._calls(delta.tool_calls)),
        )

    def _call_delta(self, part: ToolCallDelta) -> ToolCallDelta:
        """Set the id on the first delta of a call."""
        if part.index < len(self._assigned):
            return part
        self._assigned.append(self._new_id(part.name))
        return replace(part, id=self._assigned[-1])

    def _calls(self, calls: Sequence[ToolCall | UnparsedToolCall]) -> Iterator[ToolCall | UnparsedToolCall]:
        """Set the ids of complete calls, which close in the order in which they began."""
        for call in calls:
            if isinstance(call, ToolCall):
                yield replace(call, id=self._assigned[self._num_closed])
            else:
                yield call
            self._num_closed += isinstance(call, ToolCall) or call.index is not None

    def _new_id(self, name: str) -> str:
        if self._prefix is not None:
            return self._prefix + secrets.token_hex(12)
        # A client that dropped its oldest calls may still have ids with higher numbers.
        while f"functions.{name}:{self._next}" in self._used:
            self._next += 1
        self._next += 1
        return f"functions.{name}:{self._next - 1}"

"""Ids of tool calls: the client's on its side, Kimi's `functions.NAME:INDEX` on the model's.

Kimi counts calls from 0 over the whole conversation, and does worse if it reads ids of another kind. So every call
is counted anew on the way in, whatever its id, and a new call is given an id of the client's kind on the way out.
Nothing needs to be remembered between two requests: what comes back is counted again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kimi_mlx.server.errors import ApiError
from kimi_mlx.text.messages import Delta, Message, ToolCall, ToolCallDelta, UnparsedToolCall

NATIVE = re.compile(r"functions\..+:\d+")
PREFIX = re.compile(r"(?:[A-Za-z]+[_-])+")  # `call_`, `toolu_`, `chatcmpl-tool-`
DEFAULT_PREFIX = "call_"


@dataclass(frozen=True)
class CallIds:
    """The ids of one conversation.

    Args:
        known: those that the client sent, in their order.
        prefix: what ids of new calls begin with; None: they are Kimi's own.
    """

    known: tuple[str, ...] = ()
    prefix: str | None = None

    def allocator(self) -> CallIdAllocator:
        """The ids of one new answer."""
        return CallIdAllocator(self)


def to_kimi_ids(messages: Sequence[Message], prefix: str | None = None) -> tuple[tuple[Message, ...], CallIds]:
    """Return the conversation with Kimi's ids, and what is needed to name the calls of its answer.

    Args:
        messages: with ids of any kind. One that has been answered may be used again.
        prefix: of the ids of new calls where the conversation has none to go by; None: Kimi's own.

    Raises:
        ApiError: a result of no call, a second result, or two open calls with one id; it is the client's mistake.
    """
    known: list[str] = []
    open_calls: dict[str, str] = {}
    renamed: list[Message] = []
    for message in messages:
        calls: list[ToolCall] = []
        for call in message.tool_calls:
            if call.id in open_calls:
                raise _wrong(f"two tool calls have the id `{call.id:.80}`, and the first has no result yet")
            open_calls[call.id] = f"functions.{call.name}:{len(known)}"
            known.append(call.id)
            calls.append(replace(call, id=open_calls[call.id]))
        answered = message.tool_call_id
        if message.role == "tool":
            answered = _close(answered, open_calls, known)
        renamed.append(replace(message, tool_calls=tuple(calls), tool_call_id=answered))
    return tuple(renamed), CallIds(tuple(known), _prefix(known, prefix))


def _close(answered: str | None, open_calls: dict[str, str], known: Sequence[str]) -> str:
    """Return Kimi's id of the call that a result belongs to."""
    if answered is None:
        raise _wrong("a tool result does not say which call it belongs to")
    if answered not in open_calls:
        problem = "has a result already" if answered in known else "is nowhere before its result"
        raise _wrong(f"the tool call `{answered:.80}` {problem}")
    return open_calls.pop(answered)


def _prefix(known: Sequence[str], prefix: str | None) -> str | None:
    """The kind of the newest id."""
    if not known:
        return prefix
    if NATIVE.fullmatch(known[-1]):
        return None
    found = PREFIX.match(known[-1])
    return found.group() if found else DEFAULT_PREFIX


def _wrong(message: str) -> ApiError:
    return ApiError(400, message, "invalid_tool_call_id")


class CallIdAllocator:
    """Gives the calls of one answer the ids that the client is told."""

    def __init__(self, ids: CallIds):
        self._prefix = ids.prefix
        self._known = set(ids.known)
        self._next = len(ids.known)
        self._given: list[str] = []  # by the index of the call
        self._closed = 0

    def assign(self, delta: Delta) -> Delta:
        """Return the next piece of the answer with the client's ids."""
        return replace(
            delta,
            tool_call_deltas=tuple(self._part(part) for part in delta.tool_call_deltas),
            tool_calls=tuple(self._calls(delta.tool_calls)),
        )

    def _part(self, part: ToolCallDelta) -> ToolCallDelta:
        """Name a call with its first part."""
        if part.index < len(self._given):
            return part
        self._given.append(self._new(part.name))
        return replace(part, id=self._given[-1])

    def _calls(self, calls: Sequence[ToolCall | UnparsedToolCall]) -> Iterator[ToolCall | UnparsedToolCall]:
        """Calls are closed in the order in which they were named."""
        for call in calls:
            if isinstance(call, ToolCall):
                yield replace(call, id=self._given[self._closed])
            else:
                yield call
            self._closed += isinstance(call, ToolCall) or call.index is not None

    def _new(self, name: str) -> str:
        if self._prefix is not None:
            return self._prefix + secrets.token_hex(12)
        # A client that dropped its oldest calls may still know ids above their number.
        while f"functions.{name}:{self._next}" in self._known:
            self._next += 1
        self._next += 1
        return f"functions.{name}:{self._next - 1}"

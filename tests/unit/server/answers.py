"""Example answers for the tests of all formatters."""

from __future__ import annotations

from kimi_mlx.server.api_types import (
    AnswerEvent,
    CompleteAnswer,
    DeltaEvent,
    FinishEvent,
    KeepAlive,
    StopReason,
    Usage,
    collect,
)
from kimi_mlx.server.http.sse import ApiFormatter, StreamEvent
from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta, UnparsedToolCall

USAGE = Usage(prompt_tokens=20, completion_tokens=9, cached_tokens=16, reasoning_tokens=3)
REASONING = [Delta(reasoning="Let me "), Delta(reasoning="see.")]
TEXT = [Delta("I look "), Delta("it up ☃.")]


def call(index: int, call_id: str, *arguments: str) -> list[Delta]:
    """Return the deltas of a tool call, with the complete call at the end."""
    return [
        Delta(tool_call_deltas=(ToolCallDelta(index, call_id, "f"),)),
        *(Delta(tool_call_deltas=(ToolCallDelta(index, arguments=text),)) for text in arguments),
        Delta(tool_calls=(ToolCall(call_id, "f", "".join(arguments)),)),
    ]


CALLS = [*call(0, "a", '{"x"', ": [1]}"), *call(1, "b", "{}")]
INVALID = [
    *call(0, "a", "{", "3")[:-1],
    Delta(tool_calls=(UnparsedToolCall("f:0<|tool_call_argument_begin|>{3", "arguments are not JSON", 0),)),
]
NAMELESS = [Delta(tool_calls=(UnparsedToolCall("functions.:0", "no tool name"),))]
ANSWERS: dict[str, tuple[list[Delta], StopReason]] = {
    "empty": ([], "stop"),
    "text": (TEXT, "stop"),
    "reasoning and text": (REASONING + TEXT, "stop"),
    "only reasoning": (REASONING, "length"),
    "everything": (REASONING + TEXT + CALLS, "tool_calls"),
    "only calls": (CALLS, "tool_calls"),
    "everything in one delta": ([sum(REASONING + TEXT + CALLS, Delta())], "tool_calls"),
    "invalid call": (TEXT + INVALID, "tool_calls"),
    "nameless call": (TEXT + NAMELESS, "stop"),
    "cut off": (TEXT[:1], "length"),
}


def events_of(deltas: list[Delta], reason: StopReason = "stop", stop_sequence: str | None = None) -> list[AnswerEvent]:
    """Return the service's events for an answer."""
    events = [DeltaEvent(0, delta) for delta in deltas]
    return [KeepAlive(), KeepAlive(5, 20), *events, FinishEvent(0, reason, stop_sequence, USAGE)]


def answer_of(deltas: list[Delta], reason: StopReason = "stop", stop_sequence: str | None = None) -> CompleteAnswer:
    """Return the complete answer."""
    (answer,) = collect(events_of(deltas, reason, stop_sequence))
    return answer


def stream(formatter: ApiFormatter, events: list[AnswerEvent]) -> list[StreamEvent]:
    """Return all events of the stream."""
    sent = list(formatter.begin())
    for event in events:
        sent += formatter.add(event)
    return [*sent, *formatter.end()]

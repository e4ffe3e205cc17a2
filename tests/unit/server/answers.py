"""Answers in pieces, for the tests of every API's formatter."""

from __future__ import annotations

from kimi_mlx.server.conversation import (
    Answer,
    AnswerEvent,
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
THOUGHT = [Delta(reasoning="Let me "), Delta(reasoning="see.")]
TEXT = [Delta("I look "), Delta("it up ☃.")]


def call(index: int, call_id: str, *arguments: str) -> list[Delta]:
    """A call in parts, and whole."""
    return [
        Delta(tool_call_deltas=(ToolCallDelta(index, call_id, "f"),)),
        *(Delta(tool_call_deltas=(ToolCallDelta(index, arguments=text),)) for text in arguments),
        Delta(tool_calls=(ToolCall(call_id, "f", "".join(arguments)),)),
    ]


CALLS = [*call(0, "a", '{"x"', ": [1]}"), *call(1, "b", "{}")]
BROKEN = [
    *call(0, "a", "{", "3")[:-1],
    Delta(tool_calls=(UnparsedToolCall("f:0<|tool_call_argument_begin|>{3", "arguments are not JSON", 0),)),
]
NAMELESS = [Delta(tool_calls=(UnparsedToolCall("functions.:0", "no tool name"),))]
ANSWERS: dict[str, tuple[list[Delta], StopReason]] = {
    "nothing": ([], "stop"),
    "text": (TEXT, "stop"),
    "thought and text": (THOUGHT + TEXT, "stop"),
    "only thought": (THOUGHT, "length"),
    "everything": (THOUGHT + TEXT + CALLS, "tool_calls"),
    "calls alone": (CALLS, "tool_calls"),
    "all in one piece": ([sum(THOUGHT + TEXT + CALLS, Delta())], "tool_calls"),
    "broken call": (TEXT + BROKEN, "tool_calls"),
    "nameless call": (TEXT + NAMELESS, "stop"),
    "cut off": (TEXT[:1], "length"),
}


def items_of(deltas: list[Delta], reason: StopReason = "stop", stop_sequence: str | None = None) -> list[AnswerEvent]:
    """What the service gives for it."""
    pieces = [DeltaEvent(0, delta) for delta in deltas]
    return [KeepAlive(), KeepAlive(5, 20), *pieces, FinishEvent(0, reason, stop_sequence, USAGE)]


def answer_of(deltas: list[Delta], reason: StopReason = "stop", stop_sequence: str | None = None) -> Answer:
    """The same, whole."""
    (answer,) = collect(items_of(deltas, reason, stop_sequence))
    return answer


def stream(formatter: ApiFormatter, items: list[AnswerEvent]) -> list[StreamEvent]:
    """All events."""
    events = list(formatter.begin())
    for item in items:
        events += formatter.add(item)
    return [*events, *formatter.end()]

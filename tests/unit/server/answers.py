"""Answers in pieces, for the tests of every API's translation."""

from __future__ import annotations

from kimi_mlx.server.conversation import Answer, End, Item, Piece, StopReason, Usage, Waiting, whole
from kimi_mlx.server.translation import StreamEvent, Translation
from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta, UnparsedToolCall

USAGE = Usage(prompt=20, completion=9, cached=16, reasoning=3)
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


def items_of(deltas: list[Delta], reason: StopReason = "stop", stop_sequence: str | None = None) -> list[Item]:
    """What the service gives for it."""
    pieces = [Piece(0, delta) for delta in deltas]
    return [Waiting(), Waiting(5, 20), *pieces, End(0, reason, stop_sequence, USAGE)]


def answer_of(deltas: list[Delta], reason: StopReason = "stop", stop_sequence: str | None = None) -> Answer:
    """The same, whole."""
    (answer,) = whole(items_of(deltas, reason, stop_sequence))
    return answer


def stream(translation: Translation, items: list[Item]) -> list[StreamEvent]:
    """All events."""
    events = list(translation.begin())
    for item in items:
        events += translation.add(item)
    return [*events, *translation.end()]

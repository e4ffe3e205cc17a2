"""The order of the parts of an answer's tool calls."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.server.tool_calls import CallPart, CallSequencer
from kimi_mlx.text.messages import Delta, ToolCallDelta, join
from tests.unit.server.answers import CALLS, INVALID, call

DELTAS = [*CALLS, *call(2, "c", "{", "}")]
JOINED = join(DELTAS)


@given(st.lists(st.integers(0, len(DELTAS)), max_size=6))
def test_parts_have_the_same_order_however_deltas_are_joined(cuts: list[int]):
    sequencer = CallSequencer()
    deltas = (join(DELTAS[a:b]) for a, b in itertools.pairwise([0, *sorted(cuts), len(DELTAS)]))
    parts: list[CallPart] = []
    for part in (part for delta in deltas for part in sequencer.parts(delta)):
        last = parts[-1] if parts else None
        if isinstance(part, ToolCallDelta) and isinstance(last, ToolCallDelta):
            parts[-1:] = join([Delta(tool_call_deltas=(last,)), Delta(tool_call_deltas=(part,))]).tool_call_deltas
        else:
            parts.append(part)
    assert parts == [part for i in range(3) for part in (JOINED.tool_call_deltas[i], JOINED.tool_calls[i])]


def test_an_invalid_call_ends_like_any_other():
    parts = list(CallSequencer().parts(join([*INVALID, *CALLS[4:]])))
    assert [part.index if isinstance(part, ToolCallDelta) else type(part).__name__ for part in parts] == [
        0,
        "UnparsedToolCall",
        1,
        "ToolCall",
    ]
    assert list(CallSequencer().parts(Delta("text", "reasoning"))) == []

"""The order of calls, however their pieces are put together."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.server.tool_calls import CallPart, CallSequencer
from kimi_mlx.text.messages import Delta, ToolCallDelta, join
from tests.unit.server.answers import BROKEN, CALLS, call

PIECES = [*CALLS, *call(2, "c", "{", "}")]
WHOLE = join(PIECES)


@given(st.lists(st.integers(0, len(PIECES)), max_size=6))
def test_the_order_is_the_same_at_every_cut(cuts: list[int]):
    steps = CallSequencer()
    pieces = (join(PIECES[a:b]) for a, b in itertools.pairwise([0, *sorted(cuts), len(PIECES)]))
    seen: list[CallPart] = []
    for step in (step for piece in pieces for step in steps.parts(piece)):
        last = seen[-1] if seen else None
        if isinstance(step, ToolCallDelta) and isinstance(last, ToolCallDelta):
            seen[-1:] = join([Delta(tool_call_deltas=(last,)), Delta(tool_call_deltas=(step,))]).tool_call_deltas
        else:
            seen.append(step)
    assert seen == [step for index in range(3) for step in (WHOLE.tool_call_deltas[index], WHOLE.tool_calls[index])]


def test_a_broken_call_ends_like_any_other():
    steps = list(CallSequencer().parts(join([*BROKEN, *CALLS[4:]])))
    assert [step.index if isinstance(step, ToolCallDelta) else type(step).__name__ for step in steps] == [
        0,
        "UnparsedToolCall",
        1,
        "ToolCall",
    ]
    assert list(CallSequencer().parts(Delta("text", "thought"))) == []

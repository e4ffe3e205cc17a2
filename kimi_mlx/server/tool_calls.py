"""The order of the parts of an answer's tool calls."""

from __future__ import annotations

from collections.abc import Iterator

from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta, UnparsedToolCall

CallPart = ToolCallDelta | ToolCall | UnparsedToolCall
"""A delta of a call, or the complete call at its end."""


class CallSequencer:
    """Sorts the deltas and ends of one answer's calls into the order in which the model wrote them.

    A Delta has them in two lists, and may contain the end of one call and the beginning of the next.
    """

    def __init__(self) -> None:
        self._num_ended = 0

    def parts(self, delta: Delta) -> Iterator[CallPart]:
        """Yield the parts of the next delta; the end of a call follows its deltas and precedes the next call."""
        deltas = list(delta.tool_call_deltas)
        for call in delta.tool_calls:
            if isinstance(call, ToolCall) or call.index is not None:
                while deltas and deltas[0].index <= self._num_ended:
                    yield deltas.pop(0)
                self._num_ended += 1
            yield call
        yield from deltas

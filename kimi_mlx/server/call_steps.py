"""The calls of an answer, step by step."""

from __future__ import annotations

from collections.abc import Iterator

from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta, UnparsedToolCall

Step = ToolCallDelta | ToolCall | UnparsedToolCall
"""A part of a call; or its end, in which it is whole."""


class CallSteps:
    """Puts the parts and ends of one answer's calls into the order in which they were written.

    A piece of the answer has them in two lists, and may reach over the end of one call into the next.
    """

    def __init__(self) -> None:
        self._ended = 0

    def of(self, delta: Delta) -> Iterator[Step]:
        """The steps in the next piece; each call's end comes after its parts and before the next call's."""
        parts = list(delta.tool_call_deltas)
        for call in delta.tool_calls:
            if isinstance(call, ToolCall) or call.index is not None:
                while parts and parts[0].index <= self._ended:
                    yield parts.pop(0)
                self._ended += 1
            yield call
        yield from parts

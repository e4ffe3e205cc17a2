"""Anthropic's Messages API on the way out: an answer as a message or as events, and errors.

An answer is a list of blocks: thinking, text and one for each call. In a stream they come one after the other, each
begun, filled and ended. A call whose arguments turn out to be no JSON object has been streamed as the model wrote it;
a whole message, which can only hold an object, has `{"INVALID_JSON": "..."}`. What named no tool is told as text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from kimi_mlx.server.call_steps import CallSteps
from kimi_mlx.server.conversation import Answer, AnswerEvent, DeltaEvent, FinishEvent, Usage
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.translation import StreamEvent
from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta

# Clients send thinking back only if it is signed. There is nothing to prove here.
SIGNATURE = "kimi-mlx"
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessageFormatter:
    """The answer to one request; a `ApiFormatter`.

    Args:
        model: its name, as the answer says it.
    """

    def __init__(self, model: str):
        self._model = model
        self._id = f"msg_{secrets.token_hex(12)}"
        self._steps = CallSteps()
        self._blocks = 0  # begun
        self._open: str | None = None  # the type of the block that is being filled

    def begin(self) -> Iterator[StreamEvent]:
        """The message without its content; its tokens are counted at its end."""
        message = self._message([], None, None, Usage())
        yield _event("message_start", message=message)

    def add(self, item: AnswerEvent) -> Iterator[StreamEvent]:
        """The events of a piece; a ping while there is nothing to say."""
        if isinstance(item, DeltaEvent):
            yield from self._piece(item.delta)
        elif isinstance(item, FinishEvent):
            yield from self._close()
            delta = {"stop_reason": _stop_reason(item), "stop_sequence": item.stop_sequence}
            yield _event("message_delta", delta=delta, usage=_usage(item.usage))
        else:
            yield _event("ping")

    def end(self) -> Iterator[StreamEvent]:
        """The last event."""
        yield _event("message_stop")

    def fail(self, error: ApiError) -> Iterator[StreamEvent]:
        """The error, in the middle of a stream."""
        yield StreamEvent.from_json(error_body(error), "error")

    def full_response(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer as a message."""
        (answer,) = answers
        end = answer.end
        return self._message(list(_content(answer.delta)), _stop_reason(end), end.stop_sequence, end.usage)

    def _message(
        self, content: list[dict[str, Any]], stop_reason: str | None, stop_sequence: str | None, usage: Usage
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": _usage(usage),
        }

    def _piece(self, delta: Delta) -> Iterator[StreamEvent]:
        if delta.reasoning:
            yield from self._go_on_with("thinking", thinking="", signature="")
            yield self._fill("thinking_delta", thinking=delta.reasoning)
        if delta.text:
            yield from self._text(delta.text)
        for step in self._steps.of(delta):
            if isinstance(step, ToolCallDelta):
                yield from self._call_part(step)
            elif isinstance(step, ToolCall) or step.index is not None:
                yield from self._close()
            else:
                yield from self._text(step.raw)

    def _text(self, text: str) -> Iterator[StreamEvent]:
        yield from self._go_on_with("text", text="")
        yield self._fill("text_delta", text=text)

    def _call_part(self, part: ToolCallDelta) -> Iterator[StreamEvent]:
        if part.name:
            yield from self._close()
            yield from self._go_on_with("tool_use", id=part.id, name=part.name, input={})
        if part.arguments:
            yield self._fill("input_json_delta", partial_json=part.arguments)

    def _go_on_with(self, kind: str, **empty: Any) -> Iterator[StreamEvent]:
        """Begin a block of this type, unless one is open."""
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        self._blocks += 1
        yield _event("content_block_start", index=self._blocks - 1, content_block={"type": kind, **empty})

    def _fill(self, kind: str, **value: str) -> StreamEvent:
        return _event("content_block_delta", index=self._blocks - 1, delta={"type": kind, **value})

    def _close(self) -> Iterator[StreamEvent]:
        """End the open block, if there is one."""
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._fill("signature_delta", signature=SIGNATURE)
        self._open = None
        yield _event("content_block_stop", index=self._blocks - 1)


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    message = error.message
    if error.code == "context_length_exceeded":  # Claude Code looks for these words, and shortens the conversation
        message = f"prompt is too long: {message}"
    fallback = "invalid_request_error" if error.status < 500 else "api_error"
    kind = ERROR_TYPES.get(error.status, fallback)
    place = f"{error.param}: " if error.param and error.param not in message else ""
    return {"type": "error", "error": {"type": kind, "message": place + message}}


def _content(delta: Delta) -> Iterator[dict[str, Any]]:
    """The blocks of a whole answer."""
    if delta.reasoning:
        yield {"type": "thinking", "thinking": delta.reasoning, "signature": SIGNATURE}
    nameless = [call.raw for call in delta.tool_calls if not isinstance(call, ToolCall) and call.index is None]
    text = "".join([delta.text, *nameless])
    if text:
        yield {"type": "text", "text": text}
    broken = {call.index for call in delta.tool_calls if not isinstance(call, ToolCall)}
    for part in delta.tool_call_deltas:
        value = {"INVALID_JSON": part.arguments} if part.index in broken else json.loads(part.arguments)
        yield {"type": "tool_use", "id": part.id, "name": part.name, "input": value}


def _stop_reason(end: FinishEvent) -> str:
    return "stop_sequence" if end.stop_sequence is not None else STOP_REASONS[end.reason]


def _usage(usage: Usage) -> dict[str, Any]:
    """Tokens as Anthropic counts them: what came from the cache is no input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _event(kind: str, **fields: Any) -> StreamEvent:
    return StreamEvent.from_json({"type": kind, **fields}, kind)

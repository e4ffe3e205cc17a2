"""Responses of Anthropic's Messages API: a message, or its events, and errors.

An answer is a list of blocks: thinking, text and one for each tool call. In a stream, each block starts, gets its
deltas and stops before the next one starts. A stream has the arguments of a call as the model wrote them, even if they
are not a JSON object; a complete message can only contain an object, and has `{"INVALID_JSON": "..."}` instead. A call
that names no tool is sent as text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from kimi_mlx.server.anthropic.messages_body import NO_THREADS
from kimi_mlx.server.api_types import (
    NOTES_FIELD,
    AnswerEvent,
    CompleteAnswer,
    DeltaEvent,
    FinishEvent,
    KeepAlive,
    Usage,
)
from kimi_mlx.server.errors import ApiError, PromptTooLongError
from kimi_mlx.server.http.sse import StreamEvent
from kimi_mlx.server.tool_calls import CallSequencer
from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta

# Clients send thinking back only if it is signed. We never check the signature.
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
    """Formats the answer to one request; an `ApiFormatter`.

    Args:
        model: name of the model in the response.
    """

    def __init__(self, model: str):
        self._model = model
        self._id = f"msg_{secrets.token_hex(12)}"
        self.notes: Sequence[str] = ()
        self._calls = CallSequencer()
        self._num_blocks = 0  # blocks started so far
        self._open: str | None = None  # type of the open block

    def begin(self) -> Iterator[StreamEvent]:
        """Yield the message without content and without token counts, which follow at the end."""
        message = self._message([], None, None, Usage())
        yield _event("message_start", message=message)

    def add(self, event: AnswerEvent) -> Iterator[StreamEvent]:
        """Yield the events of a delta or of the end; a ping for a KeepAlive."""
        if isinstance(event, DeltaEvent):
            yield from self._delta_events(event.delta)
        elif isinstance(event, FinishEvent):
            yield from self._stop_block()
            delta = {"stop_reason": _stop_reason(event), "stop_sequence": event.stop_sequence}
            yield _event("message_delta", delta=delta, usage=_usage(event.usage))
        elif isinstance(event, KeepAlive):
            yield _event("ping")

    def end(self) -> Iterator[StreamEvent]:
        """Yield the last event."""
        yield _event("message_stop")

    def fail(self, error: ApiError) -> Iterator[StreamEvent]:
        """Yield the error that ends the stream."""
        yield StreamEvent.from_json(anthropic_error(error), "error")

    def full_response(self, answers: Sequence[CompleteAnswer]) -> dict[str, Any]:
        """Return the message."""
        (answer,) = answers
        finish = answer.finish
        return self._message(list(_content(answer.delta)), _stop_reason(finish), finish.stop_sequence, finish.usage)

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
            **({NOTES_FIELD: [*self.notes]} if self.notes else {}),
        }

    def _delta_events(self, delta: Delta) -> Iterator[StreamEvent]:
        if delta.reasoning:
            yield from self._start_block("thinking", thinking="", signature="")
            yield self._block_delta("thinking_delta", thinking=delta.reasoning)
        if delta.text:
            yield from self._text(delta.text)
        for part in self._calls.parts(delta):
            if isinstance(part, ToolCallDelta):
                yield from self._call_delta(part)
            elif isinstance(part, ToolCall) or part.index is not None:
                yield from self._stop_block()
            else:
                yield from self._text(part.raw)

    def _text(self, text: str) -> Iterator[StreamEvent]:
        yield from self._start_block("text", text="")
        yield self._block_delta("text_delta", text=text)

    def _call_delta(self, part: ToolCallDelta) -> Iterator[StreamEvent]:
        if part.name:
            yield from self._stop_block()
            yield from self._start_block("tool_use", id=part.id, name=part.name, input={})
        if part.arguments:
            yield self._block_delta("input_json_delta", partial_json=part.arguments)

    def _start_block(self, block_type: str, **empty: Any) -> Iterator[StreamEvent]:
        """Start a block, unless one of this type is open."""
        if self._open == block_type:
            return
        yield from self._stop_block()
        self._open = block_type
        self._num_blocks += 1
        yield _event("content_block_start", index=self._num_blocks - 1, content_block={"type": block_type, **empty})

    def _block_delta(self, delta_type: str, **value: str) -> StreamEvent:
        return _event("content_block_delta", index=self._num_blocks - 1, delta={"type": delta_type, **value})

    def _stop_block(self) -> Iterator[StreamEvent]:
        """Stop the open block, if there is one."""
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._block_delta("signature_delta", signature=SIGNATURE)
        self._open = None
        yield _event("content_block_stop", index=self._num_blocks - 1)


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Return an error in Anthropic's format."""
    message = f"{error.param}: {error.message}" if error.param and error.param not in error.message else error.message
    if isinstance(error, PromptTooLongError):
        message = error.anthropic_message
    fallback = "invalid_request_error" if error.status < 500 else "api_error"
    error_type = ERROR_TYPES.get(error.status, fallback)
    details = {"details": {"error_code": NO_THREADS}} if error.code == NO_THREADS else {}
    return {"type": "error", "error": {"type": error_type, "message": message, **details}}


def _content(delta: Delta) -> Iterator[dict[str, Any]]:
    """Yield the blocks of a complete answer."""
    if delta.reasoning:
        yield {"type": "thinking", "thinking": delta.reasoning, "signature": SIGNATURE}
    nameless = [call.raw for call in delta.tool_calls if not isinstance(call, ToolCall) and call.index is None]
    text = "".join([delta.text, *nameless])
    if text:
        yield {"type": "text", "text": text}
    invalid = {call.index for call in delta.tool_calls if not isinstance(call, ToolCall)}
    for part in delta.tool_call_deltas:
        value = {"INVALID_JSON": part.arguments} if part.index in invalid else json.loads(part.arguments)
        yield {"type": "tool_use", "id": part.id, "name": part.name, "input": value}


def _stop_reason(finish: FinishEvent) -> str:
    return "stop_sequence" if finish.stop_sequence is not None else STOP_REASONS[finish.reason]


def _usage(usage: Usage) -> dict[str, Any]:
    """Return token counts as Anthropic reports them: cached tokens are not part of the input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _event(event_type: str, **fields: Any) -> StreamEvent:
    return StreamEvent.from_json({"type": event_type, **fields}, event_type)

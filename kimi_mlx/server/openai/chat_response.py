"""Answers as POST /v1/chat/completions gives them: chunks of a stream, or one object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kimi_mlx.server.conversation import Answer, AnswerEvent, DeltaEvent, FinishEvent, TokenLogprobs, Usage, total_usage
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.translation import StreamEvent
from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta, UnparsedToolCall

DONE = StreamEvent("[DONE]")


class ChatFormatter:
    """The answers to one request.

    Args:
        id: of the answer.
        model: its name.
        created: when, in seconds of Unix.
        include_usage: a stream ends with it.
        include_logprobs: with the tokens of the text.
    """

    def __init__(self, id: str, model: str, created: int, *, include_usage: bool, include_logprobs: bool):
        self._head: dict[str, Any] = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._include_usage, self._include_logprobs = include_usage, include_logprobs
        self._ends: list[FinishEvent] = []
        self._begun: set[int] = set()

    def begin(self) -> Iterable[StreamEvent]:
        """Nothing: each answer begins with its first piece."""
        return ()

    def add(self, item: AnswerEvent) -> Iterator[StreamEvent]:
        """Chunks."""
        if isinstance(item, DeltaEvent | FinishEvent) and item.index not in self._begun:
            self._begun.add(item.index)
            yield self._chunk(item.index, {"role": "assistant", "content": ""})
        if isinstance(item, DeltaEvent):
            yield from self._piece(item)
        elif isinstance(item, FinishEvent):
            self._ends.append(item)
            yield self._chunk(item.index, {}, finish_reason=item.reason)

    def end(self) -> Iterator[StreamEvent]:
        """The figures, and the end."""
        if self._include_usage:
            yield StreamEvent.from_json(self._head | {"choices": [], "usage": usage_dict(total_usage(self._ends))})
        yield DONE

    def fail(self, error: ApiError) -> Iterator[StreamEvent]:
        """The error as a chunk, as OpenAI's clients expect it."""
        yield StreamEvent.from_json(openai_error(error))
        yield DONE

    def full_response(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The object."""
        return self._head | {
            "object": "chat.completion",
            "choices": [self._choice(answer) for answer in answers],
            "usage": usage_dict(total_usage(answer.end for answer in answers)),
        }

    def _choice(self, answer: Answer) -> dict[str, Any]:
        calls = [_call(part) for part in answer.delta.tool_call_deltas]
        text = answer.delta.text + "".join(_nameless(answer.delta))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        if answer.delta.reasoning:
            message["reasoning_content"] = answer.delta.reasoning
        if calls:
            message["tool_calls"] = calls
        return {
            "index": answer.end.index,
            "message": message,
            "logprobs": logprobs_dict(answer.logprobs) if self._include_logprobs else None,
            "finish_reason": answer.end.reason,
        }

    def _piece(self, piece: DeltaEvent) -> Iterator[StreamEvent]:
        delta = piece.delta
        if delta.reasoning:
            yield self._chunk(piece.index, {"reasoning_content": delta.reasoning})
        if delta.text:
            yield self._chunk(piece.index, {"content": delta.text}, piece.logprobs)
        for part in delta.tool_call_deltas:
            said = _call(part) if part.name else {"function": {"arguments": part.arguments}}
            yield self._chunk(piece.index, {"tool_calls": [{"index": part.index, **said}]})
        for raw in _nameless(delta):
            yield self._chunk(piece.index, {"content": raw})

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprobs] = (),
        finish_reason: str | None = None,
    ) -> StreamEvent:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs_dict(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        return StreamEvent.from_json(
            self._head | {"choices": [choice]} | ({"usage": None} if self._include_usage else {})
        )


def _call(part: ToolCallDelta) -> dict[str, Any]:
    """A call, or the beginning of one; arguments that are no JSON are told as they were written."""
    return ToolCall(part.id, part.name, part.arguments).to_dict()


def _nameless(delta: Delta) -> list[str]:
    """What stood in the place of a call and named no tool: all that is left is to show it."""
    return [call.raw for call in delta.tool_calls if isinstance(call, UnparsedToolCall) and call.index is None]


def usage_dict(usage: Usage) -> dict[str, Any]:
    """Tokens as OpenAI counts them: reasoning is part of the completion."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def logprobs_dict(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Tokens and how likely they were."""
    return {
        "content": [
            {
                **_token(each.token, each.logprob),
                "top_logprobs": [_token(token, logprob) for token, logprob in each.top],
            }
            for each in tokens
        ],
        "refusal": None,
    }


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode(errors="replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(token)}


MIN_LOGPROB = -9999.0
"""As OpenAI writes what has no probability at all: JSON knows no infinity."""


def openai_error(error: ApiError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}

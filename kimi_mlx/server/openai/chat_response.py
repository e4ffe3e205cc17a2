"""Responses of POST /v1/chat/completions: chunks of a stream, or one object.

The input of a custom tool without a grammar is one chunk: the model writes it as JSON, which is decoded at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_mlx.server.api_types import (
    AnswerEvent,
    CompleteAnswer,
    DeltaEvent,
    FinishEvent,
    ProgressEvent,
    TokenLogprobs,
    total_usage,
)
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.sse import StreamEvent
from kimi_mlx.server.openai.custom_tools import decode_input
from kimi_mlx.server.openai.response_fields import (
    DONE,
    MIN_LOGPROB,
    notes_dict,
    openai_error,
    progress_dict,
    timings_dict,
    usage_dict,
)
from kimi_mlx.server.openai.tool_table import ToolName
from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta, UnparsedToolCall


@dataclass
class _OpenInput:
    """The input of a custom tool that is being streamed.

    Args:
        index: index of the call in its answer.
        tool: the tool.
        arguments: parts of its arguments that have not been sent.
    """

    index: int
    tool: ToolName
    arguments: list[str] = field(default_factory=list[str])

    @property
    def text(self) -> str:
        """Text that has not been sent."""
        return decode_input("".join(self.arguments), is_free_text=self.tool.is_free_text)


class ChatFormatter:
    """Formats the answers to one request; an `ApiFormatter`.

    Args:
        id: id of the response.
        model: name of the model.
        created: creation time, as a Unix time in seconds.
        include_usage: whether a stream ends with the token counts.
        include_logprobs: whether the response contains log probabilities.
        include_progress: whether a stream has the progress of the prompt, and the response has `timings`.
        include_reasoning: whether the response contains the reasoning.
        tools: names of the tools in the API, by the names of the functions.
    """

    def __init__(
        self,
        id: str,
        model: str,
        created: int,
        *,
        include_usage: bool,
        include_logprobs: bool,
        include_progress: bool = False,
        include_reasoning: bool = True,
        tools: Mapping[str, ToolName] | None = None,
    ):
        self._head: dict[str, Any] = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._include_usage, self._include_logprobs = include_usage, include_logprobs
        self._include_progress, self._include_reasoning = include_progress, include_reasoning
        self.notes: Sequence[str] = ()
        self._finishes: list[FinishEvent] = []
        self._started: set[int] = set()
        self._tools = tools or {}
        self._inputs: dict[int, _OpenInput] = {}  # by the index of the answer

    def begin(self) -> Iterable[StreamEvent]:
        """Return no events: each answer starts with its first delta."""
        return ()

    def add(self, event: AnswerEvent) -> Iterator[StreamEvent]:
        """Yield the chunks of an event."""
        if isinstance(event, DeltaEvent | FinishEvent) and event.index not in self._started:
            self._started.add(event.index)
            yield self._chunk(event.index, {"role": "assistant", "content": ""})
        if isinstance(event, DeltaEvent):
            yield from self._delta_chunks(event)
        elif isinstance(event, FinishEvent):
            yield from self._end_input(event.index)
            self._finishes.append(event)
            yield self._chunk(event.index, {}, finish_reason=event.reason, **notes_dict(self.notes))
        elif isinstance(event, ProgressEvent):
            yield StreamEvent.from_json(self._head | {"choices": []} | progress_dict(event))

    def end(self) -> Iterator[StreamEvent]:
        """Yield the token counts and the times, if requested, and the end marker."""
        last = self._timings(self._finishes)
        if self._include_usage:
            last["usage"] = usage_dict(total_usage(self._finishes))
        if last:
            yield StreamEvent.from_json(self._head | {"choices": []} | last)
        yield DONE

    def fail(self, error: ApiError) -> Iterator[StreamEvent]:
        """Yield the error as a chunk, as OpenAI's clients expect it."""
        yield StreamEvent.from_json(openai_error(error))
        yield DONE

    def full_response(self, answers: Sequence[CompleteAnswer]) -> dict[str, Any]:
        """Return the chat completion object."""
        return self._head | {
            "object": "chat.completion",
            "choices": [self._choice(answer) for answer in answers],
            "usage": usage_dict(total_usage(answer.finish for answer in answers)),
            **self._timings([answer.finish for answer in answers]),
            **notes_dict(self.notes),
        }

    def _timings(self, finishes: Sequence[FinishEvent]) -> dict[str, Any]:
        """Return the times of the first answer, if requested."""
        statistics = finishes[0].statistics if self._include_progress and finishes else None
        return {} if statistics is None else {"timings": timings_dict(statistics)}

    def _choice(self, answer: CompleteAnswer) -> dict[str, Any]:
        calls = [self._call(part) for part in answer.delta.tool_call_deltas]
        text = answer.delta.text + "".join(_nameless_calls(answer.delta))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        if answer.delta.reasoning and self._include_reasoning:
            message["reasoning_content"] = answer.delta.reasoning
        if calls:
            message["tool_calls"] = calls
        return {
            "index": answer.finish.index,
            "message": message,
            "logprobs": _logprobs(answer.logprobs) if self._include_logprobs else None,
            "finish_reason": answer.finish.reason,
        }

    def _delta_chunks(self, event: DeltaEvent) -> Iterator[StreamEvent]:
        delta = event.delta
        if delta.reasoning and self._include_reasoning:
            yield self._chunk(event.index, {"reasoning_content": delta.reasoning})
        if delta.text:
            yield self._chunk(event.index, {"content": delta.text}, event.logprobs)
        for part in delta.tool_call_deltas:
            yield from self._call_chunks(event.index, part)
        for raw in _nameless_calls(delta):
            yield self._chunk(event.index, {"content": raw})

    def _call_chunks(self, answer: int, part: ToolCallDelta) -> Iterator[StreamEvent]:
        """Yield the chunks of a part of a call."""
        tool = self._tools.get(part.name)
        if part.name:
            yield from self._end_input(answer)
        if tool is not None and tool.type == "custom":
            self._inputs[answer] = _OpenInput(part.index, tool)
            call = self._call(ToolCallDelta(part.index, part.id, part.name))
            yield self._call_chunk(answer, part.index, call)
        if answer not in self._inputs:
            call = self._call(part) if part.name else {"function": {"arguments": part.arguments}}
            yield self._call_chunk(answer, part.index, call)
        elif part.arguments and self._inputs[answer].tool.is_free_text:
            yield self._call_chunk(answer, part.index, {"custom": {"input": part.arguments}})
        else:
            self._inputs[answer].arguments.append(part.arguments)

    def _end_input(self, answer: int) -> Iterator[StreamEvent]:
        """Yield the rest of the input of the open call, if that is one of a custom tool."""
        opened = self._inputs.pop(answer, None)
        if opened is not None and (text := opened.text):
            yield self._call_chunk(answer, opened.index, {"custom": {"input": text}})

    def _call_chunk(self, answer: int, index: int, call: dict[str, Any]) -> StreamEvent:
        return self._chunk(answer, {"tool_calls": [{"index": index, **call}]})

    def _call(self, part: ToolCallDelta) -> dict[str, Any]:
        """Return a tool call, or its beginning; arguments that are not valid JSON stay unchanged."""
        tool = self._tools.get(part.name)
        if tool is None or tool.type != "custom":
            return ToolCall(part.id, part.name, part.arguments).to_dict()
        text = decode_input(part.arguments, is_free_text=tool.is_free_text)
        return {"id": part.id, "type": "custom", "custom": {"name": part.name, "input": text}}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprobs] = (),
        finish_reason: str | None = None,
        **fields: Any,
    ) -> StreamEvent:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._include_usage else {}
        return StreamEvent.from_json(self._head | {"choices": [choice]} | usage | fields)


def _nameless_calls(delta: Delta) -> list[str]:
    """Return the raw text of calls that name no tool, which is sent as content."""
    return [call.raw for call in delta.tool_calls if isinstance(call, UnparsedToolCall) and call.index is None]


def _logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    content = [
        {
            **_token(token.token, token.logprob),
            "top_logprobs": [_token(top_token, logprob) for top_token, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode(errors="replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(token)}

"""Responses of OpenAI's Responses API: a response object, or its events.

An answer is a list of items: reasoning, a message, and one for each tool call. Reasoning is the content of its item,
or, if the client requested a summary, its summary, because such clients show nothing else. A call whose arguments are
not a JSON object is sent as the model wrote it, and its item is `incomplete`, as is the item at which the token limit
ended the answer. A call that names no tool is sent as text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_mlx.server.api_types import (
    NOTES_FIELD,
    AnswerEvent,
    CompleteAnswer,
    DeltaEvent,
    FinishEvent,
    TokenLogprobs,
    Usage,
)
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.http.sse import StreamEvent
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_items import call_item, completed_call
from kimi_mlx.server.openai.sealed_text import seal
from kimi_mlx.server.openai.tool_table import ToolName, ToolTable
from kimi_mlx.server.tool_calls import CallSequencer
from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta

Value = dict[str, Any]

MAX_METADATA_CHARS = 512
"""Maximum length of a value of a response's metadata; one value has the notes on the request."""

CANCELLED = "response_cancelled"
"""Code of the error that ends the answer of a cancelled response."""


def cancelled() -> ApiError:
    """Return the error that ends an answer after POST /v1/responses/{id}/cancel."""
    return ApiError(409, "the response was cancelled", CANCELLED)


@dataclass
class _OpenItem:
    """The item that is being streamed.

    Args:
        item: item as it was sent at its start.
        part: type of the part that contains its text; None for a call, which has arguments.
        tool: tool of a call.
        text: text or arguments so far.
        logprobs: log probabilities of the tokens of its text.
    """

    item: Value
    part: str | None = None
    tool: ToolName | None = None
    text: list[str] = field(default_factory=list[str])
    logprobs: list[Value] = field(default_factory=list[Value])


class ResponseFormatter:
    """Formats the answer to one request; an `ApiFormatter`.

    Args:
        model: name of the model in the response.
        body: body of the request; the response echoes some of its fields.
        table: tools of the request.
    """

    def __init__(self, model: str, body: ResponsesBody, table: ToolTable | None = None):
        self.id = f"resp_{secrets.token_hex(12)}"
        self.wants_store = body.store is not False
        """Whether the client lets the server keep the response."""
        self.kept_request = b""
        """What of the request is kept with the response, as JSON."""
        self.is_background = bool(body.background)
        self.on_end: Callable[[Value], None] = lambda response: None
        """Callback with the response object at its end, before the client receives it."""
        self._table = table or ToolTable()
        self.fields: Value = _echoed_fields(body) | {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
        }
        """Fields of the response that are known before the answer."""
        is_summary = body.reasoning is not None and body.reasoning.summary is not None
        self._reasoning_part = "summary_text" if is_summary else "reasoning_text"
        self._seals_reasoning = "reasoning.encrypted_content" in (body.include or ())
        self.notes: Sequence[str] = ()
        """Sentences about tools that were left out and grammars that are not enforced."""
        self._calls = CallSequencer()
        self._output: list[Value] = []  # complete items
        self._open: _OpenItem | None = None
        self._num_events = 0

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the callback: another process prepares long requests."""
        return {name: value for name, value in self.__dict__.items() if name != "on_end"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.__dict__.update(state)
        self.on_end = lambda response: None

    def begin(self) -> Iterator[StreamEvent]:
        """Yield the response without items."""
        yield self._event("response.created", response=self.response("in_progress"))
        yield self._event("response.in_progress", response=self.response("in_progress"))

    def add(self, event: AnswerEvent) -> Iterator[StreamEvent]:
        """Yield the events of a delta or of the end."""
        if isinstance(event, DeltaEvent):
            yield from self._delta_events(event.delta, event.logprobs)
        elif isinstance(event, FinishEvent):
            yield from self._close("incomplete" if event.reason == "length" else "completed")
            response = self._final_response(event)
            yield self._event(f"response.{response['status']}", response=response)

    def end(self) -> Iterator[StreamEvent]:
        """Return no events: the event of the FinishEvent was the last one."""
        return iter(())

    def fail(self, error: ApiError) -> Iterator[StreamEvent]:
        """Yield the failed or cancelled response that ends the stream."""
        response = self.failed_response(error)
        is_failed = response["status"] == "failed"
        yield self._event("response.failed" if is_failed else "response.incomplete", response=response)

    def failed_response(self, error: ApiError) -> Value:
        """Return the response object after an error."""
        if error.code == CANCELLED:
            response = self.response("cancelled")
        else:
            code = "rate_limit_exceeded" if error.status == 429 else "server_error"
            response = self.response("failed", error={"code": code, "message": error.message})
        self.on_end(response)
        return response

    def full_response(self, answers: Sequence[CompleteAnswer]) -> Value:
        """Return the response object."""
        (answer,) = answers
        status = "incomplete" if answer.finish.reason == "length" else "completed"
        for _ in (*self._delta_events(answer.delta, answer.logprobs), *self._close(status)):
            pass  # making the events fills the list of items; the events themselves are not needed
        return self._final_response(answer.finish)

    def response(self, status: str, **fields: Any) -> Value:
        """Return the response object with the items that are complete."""
        empty: Value = {"error": None, "incomplete_details": None, "usage": None}
        values: Value = {**self.fields, **empty, "status": status, "output": list(self._output), **fields}
        if self.notes:
            values["metadata"] = self.fields["metadata"] | {NOTES_FIELD: "; ".join(self.notes)[:MAX_METADATA_CHARS]}
        return values

    def _final_response(self, finish: FinishEvent) -> Value:
        usage = usage_dict(finish.usage)
        if finish.reason == "length":
            response = self.response("incomplete", usage=usage, incomplete_details={"reason": "max_output_tokens"})
        else:
            response = self.response("completed", usage=usage, completed_at=int(time.time()))
        self.on_end(response)
        return response

    def _delta_events(self, delta: Delta, logprobs: Sequence[TokenLogprobs]) -> Iterator[StreamEvent]:
        if delta.reasoning:
            yield from self._text_delta(self._reasoning_part, delta.reasoning)
        if delta.text:
            yield from self._text_delta("output_text", delta.text, [_logprob(token) for token in logprobs])
        for part in self._calls.parts(delta):
            if isinstance(part, ToolCallDelta):
                yield from self._call_delta(part)
            elif isinstance(part, ToolCall) or part.index is not None:
                yield from self._close("completed" if isinstance(part, ToolCall) else "incomplete")
            else:
                yield from self._text_delta("output_text", part.raw)

    def _text_delta(self, part: str, text: str, logprobs: Sequence[Value] = ()) -> Iterator[StreamEvent]:
        """Add text to the open item if it has this part; otherwise start a new item."""
        if self._open is None or self._open.part != part:
            yield from self._start(_OpenItem(_empty_item(part), part))
            yield self._part_event("added", part, "")
        assert self._open is not None
        self._open.text.append(text)
        self._open.logprobs += logprobs
        fields = {"logprobs": logprobs} if part == "output_text" else {}
        yield self._text_event("delta", part, delta=text, **fields)

    def _call_delta(self, part: ToolCallDelta) -> Iterator[StreamEvent]:
        if part.name:
            tool = self._table.names.get(part.name) or ToolName("function", part.name)
            yield from self._start(_OpenItem(call_item(tool, part.id), tool=tool))
        if part.arguments and self._open is not None and self._open.tool is not None:
            self._open.text.append(part.arguments)
            if self._open.tool.type == "function":
                yield self._item_event("response.function_call_arguments.delta", delta=part.arguments)

    def _start(self, opened: _OpenItem) -> Iterator[StreamEvent]:
        yield from self._close()
        self._open = opened
        opened.item["status"] = "in_progress"
        yield self._event("response.output_item.added", output_index=len(self._output), item=opened.item)

    def _close(self, status: str = "completed") -> Iterator[StreamEvent]:
        """Finish the open item, if there is one."""
        if self._open is None:
            return
        text = "".join(self._open.text)
        if self._open.part is None:
            yield from self._close_call(text, status)
        else:
            yield from self._close_text(self._open.part, text, status)
        item = self._open.item
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._open = None

    def _close_call(self, arguments: str, status: str) -> Iterator[StreamEvent]:
        assert self._open is not None
        assert self._open.tool is not None
        tool = self._open.tool
        item = self._open.item = completed_call(self._open.item, tool, arguments, status)
        if tool.type == "function":
            yield self._item_event("response.function_call_arguments.done", arguments=arguments)
        elif tool.type == "custom":
            if item["input"]:
                yield self._item_event("response.custom_tool_call_input.delta", delta=item["input"])
            yield self._item_event("response.custom_tool_call_input.done", input=item["input"])

    def _close_text(self, part: str, text: str, status: str) -> Iterator[StreamEvent]:
        assert self._open is not None
        logprobs = self._open.logprobs
        item = self._open.item = {**self._open.item, "status": status}
        item["summary" if part == "summary_text" else "content"] = [_part(part, text, logprobs)]
        if part != "output_text" and self._seals_reasoning:
            item["encrypted_content"] = seal(text)
        fields = {"logprobs": logprobs} if part == "output_text" else {}
        yield self._text_event("done", part, text=text, **fields)
        yield self._part_event("done", part, text, logprobs)

    def _part_event(self, action: str, part: str, text: str, logprobs: Sequence[Value] = ()) -> StreamEvent:
        kind, index = ("reasoning_summary", "summary_index") if part == "summary_text" else ("content", "content_index")
        return self._item_event(f"response.{kind}_part.{action}", part=_part(part, text, logprobs), **{index: 0})

    def _text_event(self, action: str, part: str, **fields: Any) -> StreamEvent:
        kind, index = ("reasoning_summary_text", "summary_index") if part == "summary_text" else (part, "content_index")
        return self._item_event(f"response.{kind}.{action}", **fields, **{index: 0})

    def _item_event(self, event_type: str, **fields: Any) -> StreamEvent:
        assert self._open is not None
        return self._event(event_type, item_id=self._open.item["id"], output_index=len(self._output), **fields)

    def _event(self, event_type: str, **fields: Any) -> StreamEvent:
        self._num_events += 1
        return StreamEvent.from_json(
            {"type": event_type, "sequence_number": self._num_events - 1, **fields}, event_type
        )


def _empty_item(part: str) -> Value:
    if part == "output_text":
        return {"type": "message", "id": f"msg_{secrets.token_hex(12)}", "role": "assistant", "content": []}
    return {"type": "reasoning", "id": f"rs_{secrets.token_hex(12)}", "summary": [], "content": []}


def _part(part: str, text: str, logprobs: Sequence[Value]) -> Value:
    value: Value = {"type": part, "text": text}
    return {**value, "annotations": [], "logprobs": logprobs} if part == "output_text" else value


def _logprob(token: TokenLogprobs) -> Value:
    top = [_token(value, logprob) for value, logprob in token.top]
    return {**_token(token.token, token.logprob), "top_logprobs": top}


def _token(value: bytes, logprob: float) -> Value:
    return {"token": value.decode(errors="replace"), "bytes": list(value), "logprob": logprob}


def usage_dict(usage: Usage) -> Value:
    """Return token counts as this API reports them."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _echoed_fields(body: ResponsesBody) -> Value:
    """Return the fields that a response echoes from its request."""
    fields = body.model_dump(
        mode="json",
        by_alias=True,
        exclude_none=True,
        include={"instructions", "max_output_tokens", "reasoning", "temperature", "text", "top_p"},
    )
    choice, parallel = body.tool_choice, body.parallel_tool_calls
    return {
        "instructions": None,
        "max_output_tokens": None,
        "reasoning": None,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "top_p": None,
        **fields,
        "metadata": dict(body.metadata or {}),
        "tools": [_echoed_tool(tool.model_dump(mode="json", exclude_unset=True)) for tool in body.tools or ()],
        "tool_choice": choice.model_dump(mode="json", exclude_unset=True)
        if isinstance(choice, Body)
        else choice or "auto",
        "parallel_tool_calls": parallel is not False,
        "previous_response_id": body.previous_response_id,
        "background": bool(body.background),
        "store": False,
        "truncation": "disabled",
        "top_logprobs": body.top_logprobs or 0,
    }


def _echoed_tool(tool: Value) -> Value:
    """Return a tool with the fields that the API always has."""
    return {"description": None, "parameters": None, "strict": None, **tool} if tool["type"] == "function" else tool

"""Responses API responses, checked with the types of the `openai` package."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from kimi_mlx.server.api_types import DeltaEvent, TokenLogprobs
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_response import ResponseFormatter
from kimi_mlx.text.messages import Delta
from tests.unit.server.answers import ANSWERS, CALLS, INVALID, NAMELESS, REASONING, TEXT, answer_of, events_of, stream

EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
FINAL_STATUS = {"length": "incomplete"}
"""Status by finish reason; `completed` for all others."""


def formatter(**fields: Any) -> ResponseFormatter:
    return ResponseFormatter("kimi", ResponsesBody.model_validate({"model": "m", "input": "Hi", **fields}))


def assemble(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Assemble items from their deltas; check that each `done` event matches."""
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if "output_index" in event:
            assert event["output_index"] == len(items) - (kind != "output_item.added")
        if kind == "output_item.added":
            items.append(event["item"])
            texts = []
        elif kind.endswith("_part.added"):
            key = "summary" if "summary" in kind else "content"
            items[-1][key] = [event["part"]]
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[-1]["id"]
            texts.append(event["delta"])
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == "".join(texts)
        elif kind.endswith("text.done"):
            assert event["text"] == "".join(texts)
        elif kind.endswith("_part.done"):
            assert event["part"]["text"] == "".join(texts)
        elif kind == "output_item.done":
            done = event["item"]
            if done["type"] == "function_call":
                items[-1]["arguments"] = "".join(texts)
            else:
                items[-1]["summary" if done.get("summary") else "content"][0]["text"] = "".join(texts)
            assert {**items[-1], "status": done["status"]} == done
            items[-1] = done
    return items


@pytest.mark.parametrize("summary", [None, "auto"])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_stream_adds_up_to_the_response(name: str, summary: str | None):
    deltas, reason = ANSWERS[name]
    streamed = formatter(reasoning={"summary": summary})
    sent = stream(streamed, events_of(deltas, reason))
    events = [json.loads(event.data) for event in sent]
    assert [event.name for event in sent] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event)
    status = FINAL_STATUS.get(reason, "completed")
    assert [events[i]["type"] for i in (0, 1, -1)] == [
        "response.created",
        "response.in_progress",
        f"response.{status}",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    response = events[-1]["response"]
    assert (response["status"], response["output"]) == (status, assemble(events))
    full = formatter(reasoning={"summary": summary}).full_response([answer_of(deltas, reason)])
    Response.model_validate(full)
    assert without_ids(full) == without_ids(response)


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{**item, "id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": output}


def output_of(deltas: list[Delta], **fields: Any) -> list[dict[str, Any]]:
    return [{**item, "id": ""} for item in formatter(**fields).full_response([answer_of(deltas)])["output"]]


def test_items():
    reasoning, message, first, second = output_of(REASONING + TEXT + CALLS)
    done = {"id": "", "status": "completed"}
    part = {"type": "reasoning_text", "text": "Let me see."}
    assert reasoning == {**done, "type": "reasoning", "summary": [], "content": [part]}
    text = {"type": "output_text", "text": "I look it up ☃.", "annotations": [], "logprobs": []}
    assert message == {**done, "type": "message", "role": "assistant", "content": [text]}
    call = {**done, "type": "function_call", "name": "f"}
    assert first == {**call, "call_id": "a", "arguments": '{"x": [1]}'}
    assert second == {**call, "call_id": "b", "arguments": "{}"}
    summary, *_ = output_of(REASONING, reasoning={"summary": "auto"})
    assert (summary["summary"], summary["content"]) == ([{**part, "type": "summary_text"}], [])


def test_invalid_calls_are_sent():
    invalid, valid = output_of([*INVALID, *CALLS[4:]])
    assert (invalid["arguments"], invalid["status"]) == ("{3", "incomplete")
    assert (valid["arguments"], valid["status"]) == ("{}", "completed")
    (message,) = output_of(NAMELESS)
    assert message["content"][0]["text"] == "functions.:0"


def test_usage_and_echoed_fields():
    tool = {"type": "function", "name": "f", "parameters": {}, "strict": None}
    text_format = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    response_formatter = formatter(
        tools=[tool],
        tool_choice={"type": "function", "name": "f"},
        text={"format": text_format},
        metadata={"a": "b"},
        store=True,
        instructions="Be brief.",
        temperature=0.5,
    )
    response = response_formatter.full_response([answer_of(TEXT, "length")])
    parsed = Response.model_validate(response)
    assert parsed.incomplete_details is not None
    assert parsed.incomplete_details.reason == "max_output_tokens"
    assert parsed.usage is not None
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens, parsed.usage.total_tokens) == (20, 9, 29)
    assert parsed.usage.input_tokens_details.cached_tokens == 16
    assert parsed.usage.output_tokens_details.reasoning_tokens == 3
    assert (parsed.metadata, parsed.instructions, parsed.temperature) == ({"a": "b"}, "Be brief.", 0.5)
    assert response["text"] == {"format": text_format}
    assert response["tool_choice"] == {"type": "function", "name": "f"}
    assert response["tools"] == [{**tool, "description": None}]
    assert response["store"] is False


def test_logprobs():
    token = TokenLogprobs("☃".encode()[:2], -0.5, ((b"a", -0.5), (b"b", -1.0)))
    (event,) = [
        e for e in formatter().add(DeltaEvent(0, Delta("x"), (token,))) if e.name == "response.output_text.delta"
    ]
    (logprob,) = json.loads(event.data)["logprobs"]
    assert (logprob["token"], logprob["bytes"], logprob["logprob"]) == ("\ufffd", [226, 152], -0.5)
    assert [top["token"] for top in logprob["top_logprobs"]] == ["a", "b"]


def test_a_failed_stream():
    for status, code in ((503, "server_error"), (429, "rate_limit_exceeded")):
        (event,) = formatter().fail(ApiError(status, "lost the ring"))
        parsed = EVENT.validate_json(event.data)
        assert parsed.type == "response.failed"
        assert parsed.response.error is not None
        assert (parsed.response.error.code, parsed.response.error.message) == (code, "lost the ring")

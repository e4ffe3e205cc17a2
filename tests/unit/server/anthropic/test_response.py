"""Messages API responses, checked with the types of the `anthropic` package."""

from __future__ import annotations

import json
from typing import Any

import anthropic.types
import pytest
from pydantic import TypeAdapter

from kimi_mlx.server.anthropic.response import SIGNATURE, MessageFormatter, anthropic_error
from kimi_mlx.server.errors import ApiError, PromptTooLongError
from kimi_mlx.text.messages import Delta
from tests.unit.server.answers import ANSWERS, CALLS, INVALID, NAMELESS, REASONING, TEXT, answer_of, events_of, stream

EVENT: TypeAdapter[anthropic.types.RawMessageStreamEvent] = TypeAdapter(anthropic.types.RawMessageStreamEvent)


def assemble(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Assemble a message from a stream like a client; check that each block stops before the next one starts."""
    message: dict[str, Any] = events[0]["message"]
    arguments = ""
    is_open = False
    for event in events[1:]:
        content: list[dict[str, Any]] = message["content"]
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(content)
            content.append(event["content_block"])
            is_open, arguments = True, ""
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(content) - 1
            delta_type, value = event["delta"].values()
            if delta_type == "input_json_delta":
                arguments += value
            else:
                content[-1][delta_type.removesuffix("_delta")] += value
        elif event["type"] == "content_block_stop":
            assert is_open
            assert event["index"] == len(content) - 1
            if content[-1]["type"] == "tool_use":
                content[-1]["input"] = as_object(arguments)
            is_open = False
        elif event["type"] == "message_delta":
            assert not is_open
            message |= event["delta"] | {"usage": event["usage"]}
    assert events[-1] == {"type": "message_stop"}
    return message


def as_object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return {"INVALID_JSON": arguments}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_stream_adds_up_to_the_message(name: str):
    deltas, reason = ANSWERS[name]
    formatter = MessageFormatter("kimi")
    sent = stream(formatter, events_of(deltas, reason))
    events = [json.loads(event.data) for event in sent]
    assert [event.name for event in sent] == [event["type"] for event in events]
    assert [event["type"] for event in events[1:3]] == ["ping", "ping"]
    message_events = [event for event in events if event["type"] != "ping"]
    for event in message_events:
        EVENT.validate_python(event)
    message = formatter.full_response([answer_of(deltas, reason)])
    assert assemble(message_events) == message
    anthropic.types.Message.model_validate(message)
    assert message["usage"] == {
        "input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 16,
        "output_tokens": 9,
        "output_tokens_details": {"thinking_tokens": 3},
    }


def content_of(deltas: list[Delta]) -> list[dict[str, Any]]:
    return MessageFormatter("kimi").full_response([answer_of(deltas)])["content"]


def test_blocks():
    thinking, text, first, second = content_of(REASONING + TEXT + CALLS)
    assert thinking == {"type": "thinking", "thinking": "Let me see.", "signature": SIGNATURE}
    assert text == {"type": "text", "text": "I look it up ☃."}
    assert first == {"type": "tool_use", "id": "a", "name": "f", "input": {"x": [1]}}
    assert second == {"type": "tool_use", "id": "b", "name": "f", "input": {}}


def test_invalid_calls_are_sent():
    assert content_of(INVALID) == [{"type": "tool_use", "id": "a", "name": "f", "input": {"INVALID_JSON": "{3"}}]
    assert content_of(NAMELESS) == [{"type": "text", "text": "functions.:0"}]


def test_stop_reasons():
    reasons = [("stop", None), ("stop", "END"), ("length", None), ("tool_calls", None)]
    messages = [MessageFormatter("kimi").full_response([answer_of(TEXT, *reason)]) for reason in reasons]
    assert [message["stop_reason"] for message in messages] == [
        "end_turn",
        "stop_sequence",
        "max_tokens",
        "tool_use",
    ]
    assert [message["stop_sequence"] for message in messages] == [None, "END", None, None]


@pytest.mark.parametrize(
    ("error", "error_type", "message"),
    [
        (ApiError(400, "no", param="messages.0"), "invalid_request_error", "messages.0: no"),
        (PromptTooLongError(9, 8, "messages"), "invalid_request_error", "prompt is too long: 9 tokens > 8 maximum"),
        (ApiError(401, "no"), "authentication_error", "no"),
        (ApiError(404, "no"), "not_found_error", "no"),
        (ApiError(413, "no"), "request_too_large", "no"),
        (ApiError(429, "no"), "rate_limit_error", "no"),
        (ApiError(405, "no"), "invalid_request_error", "no"),
        (ApiError(500, "no"), "api_error", "no"),
        (ApiError(503, "no"), "overloaded_error", "no"),
    ],
)
def test_errors(error: ApiError, error_type: str, message: str):
    assert anthropic_error(error) == {"type": "error", "error": {"type": error_type, "message": message}}
    (event,) = MessageFormatter("kimi").fail(error)
    assert (event.name, json.loads(event.data)) == ("error", anthropic_error(error))

"""Conversion of Responses API bodies to chat requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_request import to_chat_request
from kimi_mlx.text.messages import Message, ToolCall

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FILE = {"type": "input_file", "file_id": "f"}


def request_of(input_value: str | list[dict[str, Any]] = "Hi", **fields: Any) -> ChatRequest:
    return to_chat_request(parse(ResponsesBody, json.dumps({"model": "m", "input": input_value, **fields}).encode()))


def test_minimal_body():
    assert request_of() == ChatRequest(
        sampling={"temperature": None, "top_p": None},
        messages=(Message("user", "Hi"),),
        messages_name="input",
        response_schema_name="text.format.schema",
    )


def test_all_supported_fields():
    function = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
    request = request_of(
        instructions="Be brief.",
        tools=[{"type": "function", **function}, {"type": "function", "name": "g", "parameters": None, "strict": None}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, "verbosity": "low"},
        reasoning={"effort": "high", "summary": "auto"},
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.9,
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        store=True,
        metadata={"a": "b"},
        user="u",
    )
    assert request.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    empty = {"name": "g", "parameters": {"type": "object", "properties": {}}}
    assert request.tools == ({"type": "function", "function": function}, {"type": "function", "function": empty})
    assert request.tool_choice == {"name": "f"}
    assert not request.parallel_tool_calls
    assert request.response_schema == SCHEMA
    assert request.thinking
    assert (request.max_tokens, request.top_logprobs) == (9, 0)
    assert request.sampling == {"temperature": 0.5, "top_p": 0.9}


def test_tool_calls_and_results():
    request = request_of(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
            },
            {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "call_2", "name": "g", "arguments": '{"x": 1}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "4"},
            {
                "type": "function_call_output",
                "call_id": "call_2",
                "output": [{"type": "input_text", "text": "5"}, FILE],
            },
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
            {"role": "assistant", "content": "Four."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": "Why?"},
        ]
    )
    calls = (ToolCall("call_1", "f", "{}"), ToolCall("call_2", "g", '{"x": 1}'))
    assert request.messages == (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "I look.", "Hm.", calls),
        Message("tool", "4", tool_call_id="call_1"),
        Message("tool", "5\n\n[input_file: not supported]", tool_call_id="call_2"),
        Message("assistant", "Four.", "So."),
        Message("assistant", "No."),
        Message("user", "Why?"),
    )


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"reasoning": {"effort": "none"}}, "thinking", False),
        ({"reasoning": {"effort": "minimal"}}, "thinking", False),
        ({"reasoning": {"effort": "low"}}, "thinking", True),
        ({"reasoning": {"effort": None}}, "thinking", None),
        ({"text": {"format": {"type": "text"}}}, "response_schema", None),
        ({"text": {"format": {"type": "json_object"}}}, "response_schema", True),
        ({"tool_choice": "required", "tools": [{"type": "function", "name": "f"}]}, "tool_choice", "required"),
        ({"top_logprobs": 3}, "top_logprobs", 3),
    ],
)
def test_fields(fields: dict[str, Any], name: str, value: Any):
    assert getattr(request_of(**fields), name) == value


@pytest.mark.parametrize(
    ("fields", "location", "problem"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "`web_search`"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "has no `name`"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "`web_search`"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "`f`, which is not among the tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "has no `schema`"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "send the item itself"),
        ({"input": [{"id": "x"}]}, "input[0]", "send the item itself"),
        ({"input": [{"type": "web_search_call"}]}, "input[0]", "`web_search_call`"),
        (
            {"input": [{"role": "user", "content": [FILE]}]},
            "input[0].content[0].type",
            "`input_file` is not supported: use `input_text` or `input_image`",
        ),
    ],
)
def test_errors_name_the_unsupported_feature_and_its_location(fields: dict[str, Any], location: str, problem: str):
    with pytest.raises(ApiError, match=problem) as error:
        request_of(**{"input_value": fields.get("input", "Hi")} | {k: v for k, v in fields.items() if k != "input"})
    assert (error.value.status, error.value.param) == (400, location)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": []},
        {"input": [1]},
        {"input": [{"type": ["message"]}]},
        {"input": [{"role": "tool", "content": "x"}]},
        {"input": [{"type": "function_call", "name": "f"}]},
        {"max_output_tokens": 0},
        {"tool_choice": "any"},
        {"reasoning": {"effort": "much"}},
    ],
)
def test_malformed_bodies_are_refused(fields: dict[str, Any]):
    with pytest.raises(ApiError) as error:
        parse(ResponsesBody, json.dumps({"model": "m", "input": "Hi", **fields}).encode())
    assert error.value.status == 400

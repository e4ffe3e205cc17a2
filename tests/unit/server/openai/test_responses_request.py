"""Conversion of Responses API bodies to chat requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.openai.response_store import StoredState
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_request import MissingStateError, read_body, to_chat_request, to_kept_request
from kimi_mlx.server.openai.sealed_text import seal
from kimi_mlx.text.messages import Message, ToolCall

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FILE = {"type": "input_file", "file_id": "f"}
FUNCTION = {"type": "function", "name": "f"}
GRAMMAR_TOOL = {
    "type": "custom",
    "name": "patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /[A-Z* ]+/i"},
}

SAMPLING = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def request_of(input_value: str | list[dict[str, Any]] = "Hi", **fields: Any) -> ChatRequest:
    return to_chat_request(
        read_body(ResponsesBody, json.dumps({"model": "m", "input": input_value, **fields}).encode())
    )


def test_minimal_body():
    assert request_of() == ChatRequest(
        sampling=dict.fromkeys(SAMPLING),
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
    assert request.sampling == {**dict.fromkeys(SAMPLING), "temperature": 0.5, "top_p": 0.9}


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
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "has no `name`"),
        ({"tools": [{"type": "custom"}]}, "tools[0].name", "has no `name`"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]},
            "tools[0].tools[0].name",
            "no",
        ),
        ({"tools": [FUNCTION, {**FUNCTION, "type": "custom"}]}, "tools[1]", "as `tools.0.` has"),
        ({"tools": [{**GRAMMAR_TOOL, "format": {"type": "grammar"}}]}, "tools[0].format.syntax", "is missing"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "`web_search`"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "`f`, which is not among the tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "has no `schema`"),
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
        read_body(ResponsesBody, json.dumps({"model": "m", "input": "Hi", **fields}).encode())
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("fields", "previous_id", "item_ids"),
    [
        ({"previous_response_id": "resp_1"}, "resp_1", ()),
        ({"previous_response_id": "resp_1", "input": None}, "resp_1", ()),
        ({"input": [{"type": "item_reference", "id": "x"}, {"id": "y"}, {"id": "x"}]}, None, ("x", "y")),
    ],
)
def test_bodies_that_continue_stored_responses(fields: dict[str, Any], previous_id: str | None, item_ids: Any):
    with pytest.raises(MissingStateError) as error:
        read_body(ResponsesBody, json.dumps({"input": "Hi", **fields}).encode())
    assert (error.value.previous_response_id, error.value.item_ids) == (previous_id, item_ids)


def test_items_of_typed_and_custom_tools():
    request = request_of(
        [
            {"role": "user", "content": "Hi"},
            {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "*** Begin"},
            {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
            {"type": "custom_tool_call", "call_id": "c2", "name": "note", "input": 'a "quote"'},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "ok"}]},
            {"type": "function_call", "call_id": "c3", "namespace": "mail", "name": "send", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c3", "output": "sent"},
            {
                "type": "local_shell_call",
                "id": "lsh_1",
                "call_id": "c4",
                "status": "completed",
                "action": {"type": "exec", "command": ["ls"], "env": {}, "timeout_ms": None},
            },
            {"type": "local_shell_call_output", "id": "c4", "output": "a.txt"},
            {"type": "shell_call", "call_id": "c5", "action": {"commands": ["ls", "false"]}, "status": "completed"},
            {
                "type": "shell_call_output",
                "call_id": "c5",
                "output": [
                    {"stdout": "a.txt", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}},
                    {"stdout": "", "stderr": "no", "outcome": {"type": "exit", "exit_code": 1}},
                ],
            },
            {"type": "tool_search_call", "call_id": "c6", "execution": "client", "arguments": {"query": "q"}},
            {
                "type": "tool_search_output",
                "call_id": "c6",
                "execution": "client",
                "tools": [{"type": "function", "name": "found", "parameters": {}}],
            },
        ],
        tools=[GRAMMAR_TOOL, {"type": "custom", "name": "note"}],
    )
    calls = [(call.name, call.arguments) for message in request.messages for call in message.tool_calls]
    assert calls == [
        ("patch", "*** Begin"),
        ("note", '{"input": "a \\"quote\\""}'),
        ("mail__send", "{}"),
        ("local_shell", '{"command": ["ls"]}'),
        ("shell", '{"commands": ["ls", "false"]}'),
        ("tool_search", '{"query": "q"}'),
    ]
    results = [message.content for message in request.messages if message.role == "tool"]
    assert results == ["done", "ok", "sent", "a.txt", "a.txt\nno\nexit code 1", "Tools found: found"]
    assert [tool["function"]["name"] for tool in request.tools] == ["patch", "note", "found"]


def test_calls_that_ran_at_openai_are_text_or_left_out():
    request = request_of(
        [
            {"role": "user", "content": "Hi"},
            {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAunreadable"},
            {
                "type": "web_search_call",
                "id": "ws_1",
                "status": "completed",
                "action": {"type": "search", "query": "q"},
            },
            {"type": "mcp_list_tools", "id": "m", "server_label": "s", "tools": []},
            {"type": "image_generation_call", "id": "i", "result": "AAAA", "status": "completed"},
            {"type": "computer_call_output", "call_id": "x", "output": {"type": "computer_screenshot"}},
            {"type": "local_shell_call_output", "id": "unknown", "output": "x"},
            {"type": "nobody_knows"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Found."}]},
            {"role": "user", "content": "Go on"},
        ]
    )
    assert [message.role for message in request.messages] == ["user", "assistant", "user"]
    text = request.messages[1].content
    assert isinstance(text, str)
    assert "q" in text
    assert text.endswith("Found.")
    assert "AAAA" not in text
    assert not request.messages[1].reasoning_content


def test_sealed_reasoning_is_read_back():
    request = request_of(
        [
            {"role": "user", "content": "Hi"},
            {"type": "reasoning", "summary": [], "encrypted_content": seal("All of it.")},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "4"},
        ]
    )
    assert request.messages[1].reasoning_content == "All of it."


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        ({"type": "function", "name": "f"}, {"name": "f"}, ["f", "patch", "mail__send"]),
        ({"type": "function", "function": {"name": "f"}}, {"name": "f"}, ["f", "patch", "mail__send"]),
        ({"type": "custom", "name": "patch"}, {"name": "patch"}, ["f", "patch", "mail__send"]),
        ({"type": "function", "name": "send"}, {"name": "mail__send"}, ["f", "patch", "mail__send"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "patch"}]},
            "required",
            ["patch"],
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}, FUNCTION]}, "auto", ["f"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, "none", []),
    ],
)
def test_tool_choices(choice: dict[str, Any], expected: Any, names: list[str]):
    namespace = {"type": "namespace", "name": "mail", "description": "Mail", "tools": [{**FUNCTION, "name": "send"}]}
    request = request_of(tools=[FUNCTION, GRAMMAR_TOOL, namespace], tool_choice=choice)
    assert request.tool_choice == expected
    assert [tool["function"]["name"] for tool in request.tools] == names


def test_sampling_fields():
    values = dict(zip(SAMPLING, (0.5, 0.25, 1.0, -1.0, 1.5), strict=True))
    assert request_of(**values).sampling == values


def test_grammars_beyond_the_limit_are_not_enforced():
    definition = "start: /[a-z]+/ //" + "x" * 150_000
    tools = [
        {**GRAMMAR_TOOL, "name": f"t{i}", "format": {**GRAMMAR_TOOL["format"], "definition": definition}}
        for i in range(4)
    ]
    request = request_of(tools=tools)
    assert list(request.input_rules) == ["t0", "t1", "t2"]
    assert request.notes == (
        "`tools[3].format` is not enforced: the grammars of the tools have more than 500,000 characters",
    )


def test_only_the_input_of_a_request_is_kept_for_later_ones() -> None:
    body = {"input": [{"role": "user", "content": "Hi \u00e9"}], "tools": [FUNCTION] * 500, "instructions": "Be brief."}
    data = json.dumps(body).encode()
    for sent, is_continued in ((data, False), (StoredState().continued_body(data), True)):
        assert json.loads(to_kept_request(sent, is_continued=is_continued)) == {"input": body["input"]}

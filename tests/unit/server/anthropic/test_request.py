"""Conversion of Messages API bodies to chat requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kimi_mlx.server.anthropic.messages_body import CountBody, MessagesBody
from kimi_mlx.server.anthropic.request import to_chat_request
from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse
from kimi_mlx.text.messages import Message, ToolCall

HI = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
DOCUMENT = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}


def request_of(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    body = {"model": "claude-x", "max_tokens": 9, "messages": messages, **fields}
    return to_chat_request(parse(MessagesBody, json.dumps(body).encode()))


def test_minimal_body():
    assert request_of(HI) == ChatRequest(
        max_tokens=9,
        sampling={"temperature": None, "top_p": None, "top_k": None},
        messages=(Message("user", "Hi"),),
        response_schema_name="output_format.schema",
        thinking=False,
        call_id_prefix="toolu_",
    )
    body = {"model": "m", "messages": [HI]}
    assert to_chat_request(parse(CountBody, json.dumps(body).encode())).messages == (Message("user", "Hi"),)


def test_all_supported_fields():
    request = request_of(
        HI,
        system=[
            {"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Two."},
        ],
        tools=[
            {"name": "f", "description": "d", "input_schema": SCHEMA, "strict": True, "eager_input_streaming": True}
        ],
        tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        stop_sequences=["END"],
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        output_config={"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
        metadata={"user_id": "u"},
        service_tier="auto",
        context_management={"edits": []},
    )
    assert request.messages == (Message("system", "One.\n\nTwo."), Message("user", "Hi"))
    function = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
    assert request.tools == ({"type": "function", "function": function},)
    assert request.tool_choice == {"name": "f"}
    assert not request.parallel_tool_calls
    assert request.thinking
    assert request.stop == ("END",)
    assert request.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
    assert request.response_schema == SCHEMA


@pytest.mark.parametrize(("choice_type", "choice"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_tool_choices(choice_type: str, choice: str):
    tool = {"name": "f", "input_schema": SCHEMA}
    assert request_of(HI, tools=[tool], tool_choice={"type": choice_type}).tool_choice == choice


@pytest.mark.parametrize(
    ("thinking_type", "is_thinking"), [("adaptive", True), ("between_tools", True), ("disabled", False)]
)
def test_thinking(thinking_type: str, is_thinking: bool):
    assert request_of(HI, thinking={"type": thinking_type}).thinking is is_thinking


def test_tool_calls_and_results():
    request = request_of(
        HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look "},
                {"type": "text", "text": "it up."},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"city": "Zürich"}},
                {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "4"}, DOCUMENT]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such city", "is_error": True},
                {"type": "tool_result", "tool_use_id": "toolu_2"},
                {"type": "text", "text": "And"},
                {"type": "text", "text": "now?"},
            ],
        },
    )
    calls = (ToolCall("toolu_1", "f", '{"city": "Zürich"}'), ToolCall("toolu_2", "g", "{}"))
    assert request.messages[1:] == (
        Message("assistant", "I look it up.", "Hm.", calls),
        Message("tool", "4\n\n[document: not supported]", tool_call_id="toolu_1"),
        Message("tool", "Error: no such city", tool_call_id="toolu_2"),
        Message("tool", "", tool_call_id="toolu_2"),
        Message("user", "And\n\nnow?"),
    )


@pytest.mark.parametrize(
    ("value", "arguments"),
    [
        ({"INVALID_JSON": "{3"}, "{3"),
        ({"__unparsedToolInput": {"raw": "{3", "len": 2}}, "{3"),
        ({"INVALID_JSON": 3}, '{"INVALID_JSON": 3}'),
        ({"INVALID_JSON": "{3", "x": 1}, '{"INVALID_JSON": "{3", "x": 1}'),
    ],
)
def test_invalid_arguments_come_back_as_the_model_wrote_them(value: dict[str, Any], arguments: str):
    call = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": value}
    assert request_of({"role": "assistant", "content": [call]}, HI).messages[0].tool_calls[0].arguments == arguments


def test_a_last_message_of_the_assistant_is_continued():
    request = request_of(HI, {"role": "assistant", "content": [{"type": "text", "text": "The answer is ("}]})
    assert request.messages == (Message("user", "Hi"),)
    assert request.partial == "The answer is ("


def test_the_billing_header_is_removed_from_the_prompt():
    header = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;"
    system = [{"type": "text", "text": header}, {"type": "text", "text": "You are helpful."}]
    assert request_of(HI, system=system).messages[0] == Message("system", "You are helpful.")
    assert request_of(HI, system=f"{header}\nYou are helpful.").messages[0] == Message("system", "You are helpful.")
    assert request_of({"role": "system", "content": system}, HI).messages[0] == Message("system", "You are helpful.")
    assert request_of({"role": "user", "content": header}).messages == (Message("user", header),)


def message_with(role: str, **block: Any) -> dict[str, Any]:
    return {"role": role, "content": [block]}


BLOCK = "messages[0].content[0]"
FIRST = f"{BLOCK}.type"
RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "x"}
CALL: dict[str, Any] = {"type": "tool_use", "id": "x", "name": "f", "input": {}}


def text_of(*blocks: dict[str, Any]) -> Any:
    return request_of({"role": "user", "content": list(blocks)}).messages[0].content


def test_documents_and_search_results_are_read_as_text():
    source = {"type": "text", "media_type": "text/plain", "data": "The key is under the mat."}
    document = {
        "type": "document",
        "source": source,
        "title": "Note",
        "context": "Found",
        "citations": {"enabled": True},
    }
    assert text_of(document) == "Note\nFound\nThe key is under the mat."
    parts = [{"type": "text", "text": "One."}, {"type": "image", "source": {}}, {"type": "text", "text": "Two."}]
    document = {"type": "document", "source": {"type": "content", "content": parts}}
    assert text_of(document, {"type": "text", "text": "Why?"}) == "One.\n[image: not supported]\nTwo.\n\nWhy?"
    found = {"type": "search_result", "source": "https://example.org", "title": "A", "content": parts[:1]}
    assert text_of(found) == "A\nhttps://example.org\nOne."


def test_unsupported_parts_of_a_result_become_notes():
    file = {"type": "image", "source": {"type": "file", "file_id": "f"}}
    text = {"type": "document", "source": {"type": "text", "data": "4"}}
    result = {"type": "tool_result", "tool_use_id": "x", "content": [text, file, DOCUMENT, {"type": "tool_reference"}]}
    message = request_of({"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result]}).messages[1]
    notes = ("[image: not supported]", "[document: not supported]", "[tool_reference: not supported]")
    assert message.content == "\n\n".join(("4", *notes))


def test_hosted_calls_of_earlier_answers_are_text():
    use = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}}
    result = {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}
    message = request_of(HI, {"role": "assistant", "content": [use, result]}, HI).messages[1]
    assert (
        message.content
        == '[server_tool_use: {"name": "web_search", "input": {"query": "x"}}][web_search_tool_result: []]'
    )


@pytest.mark.parametrize(
    ("messages", "fields", "location", "problem"),
    [
        ([message_with("user", **DOCUMENT)], {}, f"{BLOCK}.source.type", "`base64` is not supported: send its text"),
        ([message_with("user", type="document")], {}, f"{BLOCK}.source", "required field is missing"),
        ([message_with("user", type="container")], {}, FIRST, "`container`.* is not supported: use `text` or `image`"),
        ([message_with("assistant", **RESULT), HI], {}, FIRST, "of role `assistant`"),
        ([message_with("system", **RESULT), HI], {}, FIRST, "of role `system`"),
        ([HI, message_with("assistant", **CALL)], {}, "messages[1]", "results are missing"),
        ([HI], {"tools": [{"name": "f"}]}, "tools[0]", "no `input_schema`"),
        ([HI], {"tools": [{"input_schema": {}}]}, "tools[0]", "no `name`"),
        ([HI], {"tool_choice": {"type": "tool"}}, "tool_choice.name", "no `name`"),
        ([HI], {"tool_choice": {"type": "any"}}, "tool_choice", "there are no tools"),
        ([HI], {"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice", "`f`, which is not among the tools"),
    ],
)
def test_errors_name_the_unsupported_feature_and_its_location(
    messages: list[dict[str, Any]], fields: dict[str, Any], location: str, problem: str
):
    with pytest.raises(ApiError, match=problem) as error:
        request_of(*messages, **fields)
    assert (error.value.status, error.value.param) == (400, location)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": [{"text": "no type"}]}]},
        {"messages": [{"role": "user", "content": [{"type": ["text"]}]}]},
        {"max_tokens": 0},
        {"model": 1},
        {"output_config": {"format": {"type": "json_schema"}}},
    ],
)
def test_malformed_bodies_are_refused(fields: dict[str, Any]):
    with pytest.raises(ApiError) as error:
        parse(MessagesBody, json.dumps({"model": "m", "messages": [HI], **fields}).encode())
    assert error.value.status == 400

"""Conversations of all APIs: earlier reasoning, earlier calls, and parts of content reach the model alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kimi_mlx.errors import CallIdError
from kimi_mlx.server.anthropic.messages_body import MessagesBody
from kimi_mlx.server.anthropic.request import to_chat_request as from_anthropic
from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_request import to_chat_request as from_responses
from kimi_mlx.text.call_ids import to_kimi_ids
from kimi_mlx.text.messages import Message, ToolCall

THOUGHT = "First the weather, then the answer."
TEXT = {"text": THOUGHT}
HI = {"role": "user", "content": "Hi"}


def chat_messages(*messages: dict[str, Any]) -> tuple[Message, ...]:
    return parse(ChatBody, json.dumps({"messages": messages}).encode()).to_chat_request().messages


def assistant(**fields: Any) -> Message:
    return chat_messages(HI, {"role": "assistant", "content": "Hello", **fields}, HI)[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": THOUGHT},
        {"reasoning": THOUGHT},
        {"reasoning": THOUGHT, "reasoning_content": THOUGHT, "reasoning_details": [{"text": THOUGHT}]},
        {"reasoning_content": None, "reasoning": "", "reasoning_details": [{"type": "reasoning.text", **TEXT}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": THOUGHT, "id": None, "index": 0}]},
        {"reasoning_details": [{"text": THOUGHT[:9]}, {"type": "reasoning.encrypted"}, {"text": THOUGHT[9:]}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": THOUGHT, "signature": "x"}]},
        {"content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": "Hello"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
                     {"type": "text", "text": "Hello"}]},
        {"content": [{"type": "reasoning", "text": THOUGHT}, {"type": "text", "text": "Hello"}]},
    ],
)  # fmt: skip
def test_reasoning_that_comes_back_reaches_the_model_in_every_form(fields: dict[str, Any]) -> None:
    assert assistant(**fields) == Message("assistant", "Hello", THOUGHT)


def test_reasoning_of_all_apis_reaches_the_model_alike() -> None:
    blocks = [{"type": "thinking", "thinking": THOUGHT, "signature": "x"}, {"type": "text", "text": "Hello"}]
    anthropic = {"messages": [HI, {"role": "assistant", "content": blocks}, HI]}
    expected = Message("assistant", "Hello", THOUGHT)
    assert from_anthropic(parse(MessagesBody, json.dumps(anthropic).encode())).messages[1] == expected
    for item in (
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]},
        {"type": "reasoning", "id": "rs_1", "content": None, "summary": [{"type": "summary_text", "text": THOUGHT}]},
    ):
        answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}
        body = parse(ResponsesBody, json.dumps({"input": [HI, item, answer, HI]}).encode())
        assert from_responses(body).messages[1] == expected


ARGUMENTS = [
    ("", "{}"),
    (None, "{}"),
    (" \n", "{}"),
    ("null", "{}"),
    ('{"a": 1}', '{"a": 1}'),
    ({"a": 1}, '{"a": 1}'),
    ({}, "{}"),
    (json.dumps('{"a": 1}'), '{"a": 1}'),
    (json.dumps(json.dumps('{"a": 1}')), '{"a": 1}'),
    ("not JSON", "not JSON"),
    ('"not an object"', '"not an object"'),
    ('["a"]', '["a"]'),
]


@pytest.mark.parametrize(("sent", "expected"), ARGUMENTS)
def test_arguments_of_earlier_calls(sent: Any, expected: str) -> None:
    call = ToolCall("c1", "f", expected)
    function = {"name": "f", "arguments": sent}
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": function}]}]
    assert chat_messages(HI, *messages)[1].tool_calls == (call,)
    item = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": sent}
    output = {"type": "function_call_output", "call_id": "c1", "output": "done"}
    responses = from_responses(parse(ResponsesBody, json.dumps({"input": [HI, item, output]}).encode()))
    assert responses.messages[1].tool_calls == (call,)
    block = {"type": "tool_use", "id": "c1", "name": "f", "input": sent}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "done"}
    body = {"messages": [HI, {"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]}
    assert from_anthropic(parse(MessagesBody, json.dumps(body).encode())).messages[1].tool_calls == (call,)


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_text_has_several_types(kind: str) -> None:
    assert chat_messages({"role": "user", "content": [{"type": kind, "text": "Hi"}]})[0].content == "Hi"


@pytest.mark.parametrize(
    ("content_type", "message"),
    [
        ("input_audio", "content of type `input_audio` is not supported: use `text` or `image_url`"),
        ("txet", "content of type `txet` is not supported: use `text` or `image_url`"),
        (
            "thinking",
            "content of type `thinking` in a message of role `user` is not supported: use `text` or `image_url`",
        ),
    ],
)
def test_unsupported_content_is_named(content_type: str, message: str) -> None:
    with pytest.raises(ApiError) as error:
        chat_messages({"role": "user", "content": [{"type": content_type}]})
    assert (error.value.message, error.value.param) == (message, "messages[0].content[0].type")


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "input_text", "text": ""}, ""),
        ({"type": "input_text", "text": "21"}, "21"),
        ({"type": "input_file", "file_id": "f"}, "[input_file: not supported]"),
        ({"type": "search_result"}, "[search_result: not supported]"),
    ],
)
def test_unsupported_content_of_a_result_is_replaced(part: dict[str, Any], text: str) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": [part]}
    body = parse(ResponsesBody, json.dumps({"input": [HI, call, output]}).encode())
    assert from_responses(body).messages[-1].content == text


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ITEM = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        (lambda: chat_request(messages=[HI, {"role": "tool", "tool_call_id": "a", "content": ""}]), "messages[1]"),
        (lambda: chat_request(messages=[HI, {"role": "assistant", "tool_calls": [CALL, CALL]}]), "messages[1]"),
        (lambda: responses_request(instructions="x", input=[HI, ITEM, ITEM]), "input[2]"),
        (lambda: responses_request(input=[HI, {"type": "function_call_output", "call_id": "a", "output": ""}]),
         "input[1]"),
        (lambda: anthropic_request(
            system="x", messages=[HI, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]),
         "messages[1]"),
    ],
)  # fmt: skip
def test_errors_of_tool_call_ids_name_the_message(request_: Callable[[], ChatRequest], place: str) -> None:
    request = request_()
    with pytest.raises(CallIdError) as error:
        to_kimi_ids(request.messages, places=request.places)
    assert error.value.place == place
    assert error.value.message.startswith(f"`{place}`: ")


def test_two_tools_with_one_name_are_refused() -> None:
    names = ("f", "g", "f")
    chat = [{"type": "function", "function": {"name": name}} for name in names]
    for read in (
        lambda: chat_request(messages=[HI], tools=chat),
        lambda: responses_request(input="x", tools=[{"type": "function", "name": name} for name in names]),
        lambda: anthropic_request(messages=[HI], tools=[{"name": name, "input_schema": {}} for name in names]),
    ):
        with pytest.raises(ApiError, match=r"`tools\[2\]` has the name `f`, as `tools\[0\]` has") as error:
            read()
        assert error.value.param == "tools[2]"


def chat_request(**fields: Any) -> ChatRequest:
    return parse(ChatBody, json.dumps(fields).encode()).to_chat_request()


def responses_request(**fields: Any) -> ChatRequest:
    return from_responses(parse(ResponsesBody, json.dumps(fields).encode()))


def anthropic_request(**fields: Any) -> ChatRequest:
    return from_anthropic(parse(MessagesBody, json.dumps(fields).encode()))


CHAT_CALL = {"role": "assistant", "tool_calls": [CALL]}


def test_unsupported_parts_of_a_result_become_notes_as_in_other_apis() -> None:
    parts = [{"type": "text", "text": "4"}, {"type": "input_image", "file_id": "f"}, {"type": "file", "file": {}}]
    result = {"role": "tool", "tool_call_id": "a", "content": parts}
    text = "4\n\n[input_image: not supported]\n\n[file: not supported]"
    assert chat_messages(HI, CHAT_CALL, result)[2].content == text
    items = [ITEM, {"type": "function_call_output", "call_id": "a", "output": [parts[0], parts[2]]}]
    assert responses_request(input=[HI, *items]).messages[2].content == "4\n\n[file: not supported]"


def test_calls_of_other_types_are_calls_of_functions() -> None:
    custom = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    shell = {"id": "c2", "type": "local_shell_call", "status": "completed", "action": {"command": ["ls"]}}
    builtin = {"id": "c3", "type": "builtin_function", "function": {"name": "$web_search", "arguments": "{}"}}
    message = chat_messages(HI, {"role": "assistant", "tool_calls": [custom, shell, builtin]})[1]
    assert message.tool_calls == (
        ToolCall("c1", "patch", '{"input": "*** Begin"}'),
        ToolCall("c2", "local_shell_call", '{"action": {"command": ["ls"]}}'),
        ToolCall("c3", "$web_search", "{}"),
    )


def test_items_and_parts_of_hosted_calls_are_text() -> None:
    item = {"type": "web_search_call", "id": "w", "status": "completed", "action": {"query": "x"}}
    use = {"type": "server_tool_use", "id": "s", "name": "f", "input": {}}
    first, second = chat_messages(HI, item, {"role": "assistant", "content": [use]}, HI)[1:3]
    assert first == Message("assistant", '[web_search_call: {"query": "x"}]')
    assert second == Message("assistant", '[server_tool_use: {"name": "f", "input": {}}]')


def test_the_last_message_is_continued() -> None:
    last = {"role": "assistant", "content": "So", "name": "Kelsier", "reasoning_content": "Hm."}
    request = chat_request(messages=[HI, {**last, "partial": True}])
    assert (request.partial, request.partial_name, request.partial_reasoning) == ("So", "Kelsier", "Hm.")
    for fields in ({"continue_final_message": True, "add_generation_prompt": False}, {}):
        request = chat_request(messages=[HI, last if fields else {**last, "prefix": True}], **fields)
        assert (request.partial, len(request.messages)) == ("So", 1)
    for message, param in ((HI, "messages[0].partial"), (CHAT_CALL, "messages[0].partial")):
        with pytest.raises(ApiError, match=r"can(not)? be continued") as error:
            chat_request(messages=[{**message, "partial": True}])
        assert error.value.param == param


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_minus_one_means_no_limit(name: str) -> None:
    assert (chat_request(messages=[HI], **{name: -1}).max_tokens or 0) > 10**9
    with pytest.raises(ApiError, match="at least 1"):
        chat_request(messages=[HI], **{name: -2})


def test_a_choice_of_several_tools() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g", "h")]
    named: list[dict[str, Any]] = [{"type": "function", "function": {"name": "h"}}, {"type": "function", "name": "f"}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": named}}
    request = chat_request(messages=[HI], tools=tools, tool_choice=choice)
    assert ([tool["function"]["name"] for tool in request.tools], request.tool_choice) == (["f", "h"], "required")
    assert chat_request(messages=[HI], tools=tools, tool_choice=named[1]).tool_choice == {"name": "f"}
    for wrong, param in (
        ({"type": "function"}, "tool_choice.function"),
        ({"allowed_tools": {"tools": [{"name": "x"}]}}, "tool_choice.allowed_tools.tools"),
    ):
        with pytest.raises(ApiError) as error:
            chat_request(messages=[HI], tools=tools, tool_choice=wrong)
        assert error.value.param == param

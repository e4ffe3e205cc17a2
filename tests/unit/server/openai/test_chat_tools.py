"""Custom and built-in tools of Chat Completions: for the model, in the answer, and in the history."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageToolCallUnion
from openai.types.chat.chat_completion_chunk import ChatCompletionChunk
from pydantic import TypeAdapter

from kimi_mlx.server.api_types import ChatRequest, StopReason
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse
from kimi_mlx.server.openai import tool_table
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.chat_response import ChatFormatter
from kimi_mlx.server.openai.tool_table import ToolName
from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta, UnparsedToolCall
from tests.unit.server.answers import answer_of, events_of, stream

HI = {"role": "user", "content": "Hi"}
DEFINITION = 'start: "left" | "right"'
LARK = {"type": "grammar", "grammar": {"syntax": "lark", "definition": DEFINITION}}
ROBOT = {"type": "custom", "custom": {"name": "robot", "description": "Move", "format": LARK}}
NOTE = {"type": "custom", "custom": {"name": "note"}}
FUNCTION = {"type": "function", "function": {"name": "f"}}
SEARCH = {"type": "builtin_function", "function": {"name": "$web_search"}}


def request_of(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return parse(ChatBody, json.dumps({"messages": [HI, *messages], **fields}).encode()).to_chat_request()


def test_custom_tools_are_functions_for_the_model() -> None:
    note = {"type": "custom", "custom": {"name": "note", "format": {"type": "text"}}}
    request = request_of(tools=[FUNCTION, ROBOT, note])
    first, second, third = request.tools
    assert first == FUNCTION
    assert second["function"].keys() == {"name", "description"}
    assert second["function"]["description"].startswith("Move\n")
    assert DEFINITION in second["function"]["description"]
    assert third["function"]["parameters"]["required"] == ["input"]
    assert list(request.input_rules) == ["robot"]
    assert (request.tool_places, request.notes) == (("tools[0]", "tools[1]", "tools[2]"), ())


def test_built_in_functions_of_moonshot_are_left_out_with_a_note() -> None:
    request = request_of(tools=[SEARCH, FUNCTION])
    assert [tool["function"]["name"] for tool in request.tools] == ["f"]
    assert request.tool_places == ("tools[1]",)
    assert request.notes == ("left out, because they run at Moonshot: builtin_function `$web_search`",)
    many = [{"type": "builtin_function", "function": {"name": f"${index}"}} for index in range(100)]
    assert request_of(tools=many).notes[0].endswith("84 more")


def test_grammars_that_cannot_be_enforced_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def tool(name: str, pattern: str) -> dict[str, Any]:
        grammar = {"syntax": "regex", "definition": pattern}
        return {"type": "custom", "custom": {"name": name, "format": {"type": "grammar", "grammar": grammar}}}

    request = request_of(tools=[tool("a", "x(?=y)"), tool("b", "x")])
    (note,) = request.notes
    assert note.startswith("`tools[0].custom.format.grammar` is not enforced: ")
    assert list(request.input_rules) == ["b"]
    monkeypatch.setattr(tool_table, "MAX_CHECK_S", 0.0)
    request = request_of(tools=[tool("a", "x"), tool("b", "x")])
    assert list(request.input_rules) == ["a"]
    assert request.notes[0].endswith("the grammars of the tools take more than 0 s to check")


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        ({"type": "custom", "custom": {"name": "robot"}}, {"name": "robot"}, ["f", "robot", "note"]),
        ({"type": "custom", "name": "note"}, {"name": "note"}, ["f", "robot", "note"]),
        ({"type": "function", "function": {"name": "f"}}, {"name": "f"}, ["f", "robot", "note"]),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [ROBOT, FUNCTION]}},
            "required",
            ["f", "robot"],
        ),
        ({"type": "allowed_tools", "allowed_tools": {"tools": [SEARCH, NOTE]}}, "auto", ["note"]),
    ],
)
def test_choices(choice: Any, expected: Any, names: list[str]) -> None:
    request = request_of(tools=[SEARCH, FUNCTION, ROBOT, NOTE], tool_choice=choice)
    assert request.tool_choice == expected
    assert [tool["function"]["name"] for tool in request.tools] == names
    assert set(request.input_rules) == {"robot"} & set(names)


def custom_with(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "custom", "custom": {"name": "c", **fields}}]}


def called(**call: Any) -> dict[str, Any]:
    return {"messages": [HI, {"role": "assistant", "tool_calls": [{"id": "c", **call}]}]}


CALLED = "messages[1].tool_calls[0]"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": ["custom"]}]}, "tools[0].type"),
        ({"tools": [{"custom": {"name": "c"}}]}, "tools[0].type"),
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"tools": [{"type": "custom", "function": {"name": "c"}}]}, "tools[0].custom"),
        ({"tools": [{"type": "custom", "custom": "c"}]}, "tools[0].custom"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "builtin_function"}]}, "tools[0].function"),
        ({"tools": [FUNCTION, ROBOT, {"type": "custom", "custom": {"name": "f"}}]}, "tools[2]"),
        (custom_with(name=""), "tools[0].custom.name"),
        (custom_with(name=1), "tools[0].custom.name"),
        (custom_with(description=[]), "tools[0].custom.description"),
        (custom_with(format="grammar"), "tools[0].custom.format"),
        (custom_with(format={}), "tools[0].custom.format.type"),
        (custom_with(format={"type": "json"}), "tools[0].custom.format.type"),
        (custom_with(format={"type": "grammar"}), "tools[0].custom.format.grammar"),
        (custom_with(format={"type": "grammar", "grammar": []}), "tools[0].custom.format.grammar"),
        (
            custom_with(format={"type": "grammar", "grammar": {"syntax": "lark"}}),
            "tools[0].custom.format.grammar.definition",
        ),
        (
            custom_with(format={"type": "grammar", "grammar": {"syntax": "bnf", "definition": "x"}}),
            "tools[0].custom.format.grammar.syntax",
        ),
        (
            custom_with(format={"type": "grammar", "grammar": {"syntax": "lark", "definition": ""}}),
            "tools[0].custom.format.grammar.definition",
        ),
        ({"tools": [NOTE], "tool_choice": {"type": "custom"}}, "tool_choice.custom"),
        ({"tools": [NOTE], "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
        ({"tools": [NOTE], "tool_choice": {"type": "custom", "custom": {"name": []}}}, "tool_choice.custom.name"),
        ({"tools": [SEARCH], "tool_choice": SEARCH}, "tool_choice"),
        ({"tools": [SEARCH], "tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [NOTE], "tool_choice": {"allowed_tools": {"tools": [{"type": "custom"}]}}},
            "tool_choice.allowed_tools.tools[0].custom",
        ),
        ({"tools": [NOTE], "tool_choice": {"allowed_tools": {"tools": [ROBOT]}}}, "tool_choice.allowed_tools.tools"),
        (called(type="custom"), f"{CALLED}.custom"),
        (called(type="custom", custom={"name": "x"}), f"{CALLED}.custom.input"),
        (called(type="custom", custom={"name": "", "input": "x"}), f"{CALLED}.custom.name"),
        (called(type="custom", custom={"name": "x", "input": {}}), f"{CALLED}.custom.input"),
        (called(type="custom_tool_call", name="x"), f"{CALLED}.input"),
        (called(type="builtin_function"), f"{CALLED}.function"),
        (called(type=1, custom={}), f"{CALLED}.function"),
    ],
)
def test_hostile_forms_are_refused_with_their_place(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(ApiError) as error:
        parse(ChatBody, json.dumps({"messages": [HI], **fields}).encode()).to_chat_request()
    assert (error.value.status, error.value.param) == (400, place)


NAMES = ("type", "custom", "function", "name", "format", "grammar", "syntax", "definition", "input", "allowed_tools")
SCALARS = st.sampled_from([None, True, 0, "", "custom", "builtin_function", "allowed_tools", "grammar", "lark", "x"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from((*NAMES, "tools", "id")), inner),
    max_leaves=10,
)


@given(st.lists(VALUES, max_size=3), VALUES, st.lists(VALUES, max_size=2))
def test_odd_tools_choices_and_calls_are_read_or_refused(tools: list[Any], choice: Any, calls: list[Any]) -> None:
    messages = [HI, {"role": "assistant", "content": "", "tool_calls": calls}]
    try:
        request_of(*messages, tools=tools, tool_choice=choice)
    except ApiError as error:
        assert error.status == 400  # noqa: PT017


def test_earlier_calls_look_as_the_model_writes_them() -> None:
    calls = [
        {"id": "a", "type": "custom", "custom": {"name": "robot", "input": "left"}, "function": None},
        {"id": "b", "type": "custom", "custom": {"name": "note", "input": 'a "quote"'}},
        {"id": "x", "call_id": "c", "type": "custom_tool_call", "name": "robot", "input": "right"},
        {"id": "d", "type": "builtin_function", "function": {"name": "$web_search", "arguments": '{"q": "x"}'}},
    ]
    results = [{"role": "tool", "tool_call_id": call_id, "content": "done"} for call_id in "abcd"]
    expected = [
        ToolCall("a", "robot", "left"),
        ToolCall("b", "note", '{"input": "a \\"quote\\""}'),
        ToolCall("c", "robot", "right"),
        ToolCall("d", "$web_search", '{"q": "x"}'),
    ]
    history = ({"role": "assistant", "tool_calls": calls}, *results)
    assert request_of(*history, tools=[SEARCH, ROBOT, NOTE]).messages[1].tool_calls == tuple(expected)
    expected[0] = ToolCall("a", "robot", '{"input": "left"}')
    expected[2] = ToolCall("c", "robot", '{"input": "right"}')
    assert request_of(*history).messages[1].tool_calls == tuple(expected)


CALL: TypeAdapter[ChatCompletionMessageToolCallUnion] = TypeAdapter(ChatCompletionMessageToolCallUnion)
TOOLS = {
    "free": ToolName("custom", "free", is_free_text=True),
    "note": ToolName("custom", "note"),
    "f": ToolName("function", "f"),
}


def formatter() -> ChatFormatter:
    return ChatFormatter("id", "m", 0, include_usage=False, include_logprobs=False, tools=TOOLS)


def streamed_calls(deltas: list[Delta], reason: StopReason) -> list[dict[str, Any]]:
    """Return the calls of a stream, assembled as clients do; check its chunks."""
    calls: list[dict[str, Any]] = []
    for event in stream(formatter(), events_of(deltas, reason))[:-1]:
        chunk = json.loads(event.data)
        for part in chunk["choices"][0]["delta"].get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append({key: dict(value) if isinstance(value, dict) else value for key, value in part.items()})
            else:
                (call,) = (call for call in calls if call["index"] == part["index"])
                (kind,) = part.keys() - {"index"}
                (name,) = part[kind]
                call[kind][name] += part[kind][name]
            if part.get("type") == "custom":  # of which the client's types of chunks do not know yet
                del part["type"]
        ChatCompletionChunk.model_validate(chunk, strict=True)
    return [{key: value for key, value in call.items() if key != "index"} for call in calls]


@given(st.lists(st.tuples(st.sampled_from(list(TOOLS)), st.text(max_size=12), st.integers(1, 5)), max_size=4))
def test_a_stream_has_the_calls_of_the_whole_response(calls: list[tuple[str, str, int]]) -> None:
    deltas: list[Delta] = []
    for index, (name, text, size) in enumerate(calls):
        arguments = text if name == "free" else json.dumps({"input": text})
        parts = [arguments[at : at + size] for at in range(0, len(arguments), size)]
        deltas.append(Delta(tool_call_deltas=(ToolCallDelta(index, f"c{index}", name),)))
        deltas += [Delta(tool_call_deltas=(ToolCallDelta(index, arguments=part),)) for part in parts]
        deltas.append(Delta(tool_calls=(ToolCall(f"c{index}", name, arguments),)))
    message = formatter().full_response([answer_of(deltas, "tool_calls")])["choices"][0]["message"]
    whole = message.get("tool_calls", [])
    for call in whole:
        CALL.validate_python(call, strict=True)
    assert [call["custom"]["input"] for call in whole if call["type"] == "custom"] == [
        text for name, text, _ in calls if name != "f"
    ]
    assert streamed_calls(deltas, "tool_calls") == whole
    assert streamed_calls([sum(deltas, Delta())], "tool_calls") == whole


def test_an_input_that_is_cut_off_is_what_the_model_wrote() -> None:
    deltas = [
        Delta(tool_call_deltas=(ToolCallDelta(0, "a", "note"), ToolCallDelta(0, arguments='{"input": "ha'))),
        Delta(tool_calls=(UnparsedToolCall("functions.note:0", "the call is not closed", 0),)),
    ]
    expected = [{"id": "a", "type": "custom", "custom": {"name": "note", "input": '{"input": "ha'}}]
    assert streamed_calls(deltas, "length") == expected
    assert formatter().full_response([answer_of(deltas, "length")])["choices"][0]["message"]["tool_calls"] == expected

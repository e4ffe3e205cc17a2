"""Ids of tool calls: Kimi's for the model, the client's for the client."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import CallIdError
from kimi_mlx.text.call_ids import to_kimi_ids
from kimi_mlx.text.messages import Delta, Message, ToolCall, ToolCallDelta, UnparsedToolCall


def calls_message(*ids: str, name: str = "f") -> Message:
    return Message("assistant", tool_calls=[ToolCall(call_id, name, "{}") for call_id in ids])


def result_message(call_id: str | None) -> Message:
    return Message("tool", "done", tool_call_id=call_id)


def ids_in(messages: Sequence[Message]) -> list[str | None]:
    return [i for m in messages for i in ([c.id for c in m.tool_calls] if m.tool_calls else [m.tool_call_id])]


def new_call(name: str = "f", index: int = 0) -> Delta:
    part = ToolCallDelta(index, "id of the model", name, "{}")
    return Delta(tool_calls=(ToolCall(part.id, name, "{}"),), tool_call_deltas=(part,))


def test_calls_are_numbered_over_the_whole_conversation():
    sent = [
        Message("user", "?"),
        calls_message("call_a", "call_b"),
        result_message("call_b"),
        result_message("call_a"),
        calls_message("x", name="g"),
    ]
    messages, ids = to_kimi_ids(sent)
    assert ids_in(messages) == [
        None,
        "functions.f:0",
        "functions.f:1",
        "functions.f:1",
        "functions.f:0",
        "functions.g:2",
    ]
    assert ids.client_ids == ("call_a", "call_b", "x")
    assert messages[0] == sent[0]


@pytest.mark.parametrize(
    ("client_ids", "prefix", "expected"),
    [
        ([], None, r"functions\.f:0"),
        ([], "toolu_", r"toolu_[0-9a-f]{24}"),
        (["functions.g:0"], "toolu_", r"functions\.f:1"),
        (["functions.f:5", "functions.f:1"], None, r"functions\.f:2"),
        (["functions.f:1"], None, r"functions\.f:2"),  # the client dropped the first call: `:1` is taken
        (["call_1", "toolu_01D7FLrf"], None, r"toolu_[0-9a-f]{24}"),
        (["chatcmpl-tool-9f"], None, r"chatcmpl-tool-[0-9a-f]{24}"),
        (["D681PevKs"], None, r"call_[0-9a-f]{24}"),
    ],
)
def test_new_calls_get_ids_in_the_clients_format(client_ids: list[str], prefix: str | None, expected: str):
    _, ids = to_kimi_ids([turn for i in client_ids for turn in (calls_message(i), result_message(i))], prefix)
    delta = ids.allocator().assign(new_call())
    (part,), (call,) = delta.tool_call_deltas, delta.tool_calls
    assert isinstance(call, ToolCall)
    assert part.id == call.id
    assert re.fullmatch(expected, part.id)


def test_only_the_first_delta_of_a_call_has_an_id_and_invalid_calls_have_none():
    answer = to_kimi_ids([])[1].allocator()
    first = answer.assign(Delta("text", "thought", tool_call_deltas=(ToolCallDelta(0, "a:9", "a"),)))
    assert first == Delta("text", "thought", tool_call_deltas=(ToolCallDelta(0, "functions.a:0", "a"),))
    more = Delta(tool_call_deltas=(ToolCallDelta(0, arguments="{"),))
    assert answer.assign(more) == more
    invalid = Delta(tool_calls=(UnparsedToolCall("", "no tool name"), UnparsedToolCall("a:9{", "cut", 0)))
    assert answer.assign(invalid) == invalid
    second = answer.assign(new_call("b", 1))
    assert [call.id for call in second.tool_calls if isinstance(call, ToolCall)] == ["functions.b:1"]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([result_message("call_1")], "does not appear before"),
        ([result_message(None)], "has no tool call id"),
        ([calls_message("a"), result_message("a"), result_message("a")], "already has a result"),
        ([calls_message("a", "a")], "two tool calls have the id `a`"),
        ([calls_message("a"), calls_message("a")], "the first has no result"),
        ([result_message("a"), calls_message("a")], "does not appear before"),
    ],
)
def test_results_without_an_open_call_are_refused(messages: list[Message], problem: str):
    with pytest.raises(CallIdError, match=problem) as error:
        to_kimi_ids(messages)
    assert error.value.place == f"messages[{len(messages) - 1}]" or problem == "does not appear before"


@given(st.lists(st.lists(st.sampled_from(["f", "g", "a.b"]), min_size=1, max_size=3), max_size=5), st.data())
def test_ids_sent_to_the_client_are_accepted_in_the_next_request(turns: list[list[str]], data: st.DataObject):
    history: list[Message] = []
    for names in turns:
        if history and data.draw(st.booleans()):  # the client drops its oldest turn
            while history and history[0].role == "tool":
                history.pop(0)
            history.pop(0)
            history = history[next((i for i, m in enumerate(history) if m.role == "assistant"), len(history)) :]
        _, ids = to_kimi_ids(history, data.draw(st.sampled_from([None, "toolu_"])))
        answer = ids.allocator()
        calls = [call for i, name in enumerate(names) for call in answer.assign(new_call(name, i)).tool_calls]
        given_ids = [call.id for call in calls if isinstance(call, ToolCall)]
        assert len({*given_ids, *ids.client_ids}) == len(given_ids) + len(ids.client_ids)
        turn = [ToolCall(i, name, "{}") for i, name in zip(given_ids, names, strict=True)]
        history += [Message("assistant", tool_calls=turn), *map(result_message, data.draw(st.permutations(given_ids)))]
        messages, _ = to_kimi_ids(history)
        native = [call.id for message in messages for call in message.tool_calls]
        assert native == [
            f"functions.{call.name}:{i}"
            for i, call in enumerate(call for message in history for call in message.tool_calls)
        ]
        assert {m.tool_call_id for m in messages if m.role == "tool"} == set(native)

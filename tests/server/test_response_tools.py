"""Custom, typed and namespaced tools of the Responses API, whose events are checked with the client's own types."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server import raw
from tests.server.running_server import RunningServer

EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
LARK = 'start: "move " DIRECTION " " COUNT\nDIRECTION: "left" | "right"\nCOUNT: /[1-9][0-9]?/'
ROBOT = {
    "type": "custom",
    "name": "robot",
    "description": "Move the robot",
    "format": {"type": "grammar", "syntax": "lark", "definition": LARK},
}
CODE = {
    "type": "custom",
    "name": "code",
    "format": {"type": "grammar", "syntax": "regex", "definition": "^[A-Z]{3}/\\d$"},
}
NOTE = {"type": "custom", "name": "note", "description": "Take a note"}
MAIL = {
    "type": "namespace",
    "name": "mail",
    "description": "Mail of the user",
    "tools": [{"type": "function", "name": "send", "parameters": {"type": "object", "properties": {}}}, NOTE],
}
TYPED = [{"type": "local_shell"}, {"type": "shell"}, {"type": "apply_patch"}]
SEARCH = {"type": "tool_search", "execution": "client"}


def stream(server: RunningServer, **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the events of a stream and its last item, which is the only call."""
    body = {
        "input": "Go on",
        "stream": True,
        "temperature": 0,
        "max_output_tokens": 400,
        "reasoning": {"effort": "none"},
    }
    response = raw.request(server.port, "POST", "/v1/responses", json.dumps(body | fields).encode())
    assert response.status == 200, response.body
    lines = response.body.decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]["response"]["output"][-1]
    (done,) = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last
    return events, last


@pytest.mark.parametrize(("tool", "pattern"), [(ROBOT, "move (left|right) [1-9][0-9]?"), (CODE, "[A-Z]{3}/[0-9]")])
def test_the_input_of_a_custom_tool_follows_its_grammar(
    running: RunningServer, tool: dict[str, Any], pattern: str
) -> None:
    choice = {"type": "custom", "name": tool["name"]}
    events, item = stream(running, tools=[tool], tool_choice=choice)
    assert (item["type"], item["name"], item["status"]) == ("custom_tool_call", tool["name"], "completed")
    assert re.fullmatch(pattern, item["input"])
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    (done,) = [event["input"] for event in events if event["type"] == "response.custom_tool_call_input.done"]
    assert "".join(deltas) == done == item["input"]
    result = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "done"}
    history = [{"role": "user", "content": "Go on"}, item, result]
    _, again = stream(running, input=history, tools=[tool], tool_choice=choice)
    assert re.fullmatch(pattern, again["input"])


@pytest.mark.parametrize(
    ("tool", "choice", "item_type", "namespace"),
    [
        (NOTE, "required", "custom_tool_call", None),
        (MAIL, {"type": "function", "name": "send", "namespace": "mail"}, "function_call", "mail"),
        (MAIL, {"type": "custom", "name": "note"}, "custom_tool_call", "mail"),
        pytest.param(SEARCH, "required", "tool_search_call", None, marks=pytest.mark.slow),
        *(pytest.param(tool, "required", f"{tool['type']}_call", None, marks=pytest.mark.slow) for tool in TYPED),
        pytest.param(TYPED[1], {"type": "shell"}, "shell_call", None, marks=pytest.mark.sweep),
    ],
)
def test_calls_have_the_items_of_their_tools(
    running: RunningServer, tool: dict[str, Any], choice: Any, item_type: str, namespace: str | None
) -> None:
    _, item = stream(running, tools=[tool], tool_choice=choice, parallel_tool_calls=False)
    assert item["type"] == item_type
    assert item.get("namespace") == namespace
    history = [{"role": "user", "content": "Go on"}, item]
    response = raw.request(running.port, "POST", "/v1/responses/input_tokens", json.dumps({"input": history}).encode())
    assert response.status == 200


def test_a_grammar_that_cannot_be_enforced_is_noted(running: RunningServer) -> None:
    tool = {**CODE, "format": {"type": "grammar", "syntax": "regex", "definition": "a(?=b)"}}
    events, item = stream(running, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    assert item["type"] == "custom_tool_call"
    assert "look-ahead" in events[-1]["response"]["metadata"]["kimi_mlx_notes"]

"""Anthropic's own tools: those that clients run have the documented inputs, the others are left out with a note."""

from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import jsonschema
import pytest
from anthropic.types import ToolUnionParam
from anthropic.types.beta import BetaMemoryTool20250818Command, BetaToolUnionParam
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from kimi_mlx.server.anthropic.messages_body import MessagesBody
from kimi_mlx.server.anthropic.request import to_chat_request
from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse

HI = {"role": "user", "content": "Hi"}
COMMAND: TypeAdapter[BetaMemoryTool20250818Command] = TypeAdapter(BetaMemoryTool20250818Command)
PATH = "/memories/a.txt"


def request_of(*tools: Any, **fields: Any) -> ChatRequest:
    return to_chat_request(parse(MessagesBody, json.dumps({"messages": [HI], "tools": tools, **fields}).encode()))


def function_of(kind: str, **fields: Any) -> dict[str, Any]:
    """Return the function for one of Anthropic's tools."""
    (tool,) = request_of({"type": kind, "name": "t", **fields}).tools
    return dict(tool["function"])


VIEW = {"command": "view", "path": PATH, "view_range": [1, -1]}
CREATE = {"command": "create", "path": PATH, "file_text": "x"}
REPLACE = {"command": "str_replace", "path": PATH, "old_str": "x", "new_str": ""}
INSERT = {"command": "insert", "path": PATH, "insert_line": 0, "insert_text": "x"}
OLD_INSERT = {"command": "insert", "path": PATH, "insert_line": 0, "new_str": "x"}
UNDO = {"command": "undo_edit", "path": PATH}
DELETE = {"command": "delete", "path": PATH}
RENAME = {"command": "rename", "old_path": PATH, "new_path": "/memories/b.txt"}
OUTSIDE = {"command": "view", "path": "/etc/passwd"}
CLICK = {"action": "left_click", "coordinate": [3, 4]}
KEY = {"action": "key", "text": "ctrl+s"}
SCROLL = {"action": "scroll", "coordinate": [3, 4], "scroll_direction": "down", "scroll_amount": 3}
DRAG = {"action": "left_click_drag", "start_coordinate": [1, 2], "coordinate": [3, 4]}
ZOOM = {"action": "zoom", "region": [0, 0, 9, 9]}


@pytest.mark.parametrize(
    ("kind", "fields", "good", "bad"),
    [
        ("bash_20241022", {}, [{"command": "ls"}], [{}, {"command": ["ls"]}]),
        ("bash_20250124", {}, [{"command": "ls"}, {"command": "", "restart": True}], [{"cmd": "ls"}]),
        ("text_editor_20241022", {}, [VIEW, CREATE, REPLACE, OLD_INSERT, UNDO], [INSERT, DELETE, {"path": PATH}]),
        ("text_editor_20250124", {}, [VIEW, CREATE, REPLACE, OLD_INSERT, UNDO], [INSERT, DELETE]),
        ("text_editor_20250429", {}, [VIEW, CREATE, REPLACE, INSERT], [OLD_INSERT, UNDO]),
        ("text_editor_20250728", {}, [VIEW, CREATE, REPLACE, INSERT], [OLD_INSERT, UNDO, {"command": "create"}]),
        ("memory_20250818", {}, [VIEW, CREATE, REPLACE, INSERT, DELETE, RENAME], [OLD_INSERT, UNDO, OUTSIDE]),
        ("computer_20241022", {}, [CLICK, KEY, {"action": "screenshot"}], [SCROLL, ZOOM, {"action": "key"}]),
        ("computer_20250124", {}, [CLICK, KEY, SCROLL, DRAG], [ZOOM, {"action": "scroll"}, {"action": "click"}]),
        ("computer_20251124", {"enable_zoom": True}, [CLICK, SCROLL, DRAG, ZOOM], [{"action": "zoom"}]),
        ("bash_20991231", {}, [{"command": "ls"}], [{}]),
    ],
)
def test_inputs_of_tools_that_clients_run(kind: str, fields: Any, good: list[Any], bad: list[Any]) -> None:
    validator = jsonschema.Draft202012Validator(function_of(kind, **fields)["parameters"])
    assert [value for value in good if not validator.is_valid(value)] == []
    assert [value for value in bad if validator.is_valid(value)] == []
    if kind.startswith("memory"):
        for value in good:
            COMMAND.validate_python(value, strict=True)


def test_options_of_tools_are_part_of_their_description() -> None:
    editor = function_of("text_editor_20250728", max_characters=5000)
    assert "5000 characters" in editor["description"]
    computer = function_of("computer_20251124", display_width_px=1024, display_height_px=768, strict=True)
    assert "1024 x 768" in computer["description"]
    assert computer["strict"] is True


def types_of_the_client() -> list[str]:
    """Return the types of all tools that the `anthropic` package knows, except those of the client's own tools."""
    tools = {tool for union in (ToolUnionParam, BetaToolUnionParam) for tool in get_args(union)}
    hints = [get_type_hints(tool)["type"] for tool in tools]
    return sorted({kind for hint in hints for kind in get_args(hint) if isinstance(kind, str)})


CLIENT_RUN = ("bash_2", "text_editor_2", "memory_2", "computer_2")
HOSTED = ("web_", "code_execution_", "tool_search_", "mcp_", "advisor_")
KINDS = (*types_of_the_client(), "nobody_knows")


@pytest.mark.parametrize("kind", KINDS)
def test_each_tool_is_offered_or_left_out_with_a_note(kind: str) -> None:
    request = request_of({"type": kind, "name": "t"}, {"name": "f", "input_schema": {}})
    names = [tool["function"]["name"] for tool in request.tools]
    if kind.startswith(CLIENT_RUN):
        assert (names, request.notes) == (["t", "f"], ())
        assert request.tool_places == ("tools[0]", "tools[1]")
        return
    reason = "they run at Anthropic" if kind.startswith(HOSTED) else "this server does not have them"
    assert (names, request.notes) == (["f"], (f"left out, because {reason}: {kind}",))
    assert request.tool_places == ("tools[1]",)


def test_servers_of_mcp_are_left_out() -> None:
    toolset = {"type": "mcp_toolset", "mcp_server_name": "mail"}
    request = request_of(toolset, toolset, mcp_servers=[{"type": "url", "name": "mail", "url": "https://example.org"}])
    assert request.notes == ("left out, because they run at Anthropic: mcp_toolset `mail`, mcp_servers",)
    assert request_of(mcp_servers=[]).notes == ()


def test_a_tool_with_a_schema_is_a_function_whatever_its_type() -> None:
    request = request_of({"type": "web_search_20250305", "name": "web_search", "input_schema": {"type": "object"}})
    assert [tool["function"]["name"] for tool in request.tools] == ["web_search"]


@pytest.mark.parametrize(
    ("tools", "fields", "place"),
    [
        ([{"type": "bash_20250124"}], {}, "tools[0]"),
        ([{"type": 1, "name": "bash"}], {}, "tools[0].type"),
        ([{"type": "bash_20250124", "name": []}], {}, "tools[0].name"),
        ([{"type": "bash_20250124", "name": "bash", "strict": "yes"}], {}, "tools[0].strict"),
        ([{"type": "computer_20250124", "name": "c", "display_width_px": "wide"}], {}, "tools[0].display_width_px"),
        ([{"type": "computer_20250124", "name": "c", "display_height_px": -1}], {}, "tools[0].display_height_px"),
        ([{"type": "text_editor_20250728", "name": "e", "max_characters": 1e300}], {}, "tools[0].max_characters"),
        ([{"type": "mcp_toolset", "mcp_server_name": {}}], {}, "tools[0].mcp_server_name"),
        ([{"type": "web_search_1"}, {"type": "bash_20250124", "name": "b"}, {"name": "b", "input_schema": {}}], {},
         "tools[2]"),
        ([{"type": "web_search_1", "name": "w"}], {"tool_choice": {"type": "tool", "name": "w"}}, "tool_choice"),
        ([{"type": "web_search_1", "name": "w"}], {"tool_choice": {"type": "any"}}, "tool_choice"),
        ([], {"mcp_servers": {"name": "x"}}, "mcp_servers"),
        ([], {"thread": {"type": "create"}}, "thread"),
    ],
)  # fmt: skip
def test_hostile_forms_are_refused_with_their_place(tools: list[Any], fields: dict[str, Any], place: str) -> None:
    with pytest.raises(ApiError) as error:
        request_of(*tools, **fields)
    assert (error.value.status, error.value.param) == (400, place)


FIELDS = ("name", "input_schema", "display_width_px", "display_height_px", "enable_zoom", "max_characters", "strict")
VALUES = st.sampled_from([None, True, 0, 1.5, 10**30, -1, "", "x", [], {}, [1], {"type": "object"}])


@given(st.sampled_from((*KINDS, "bash_", "custom", "", None, 1)), st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_odd_tools_are_read_or_refused(kind: Any, fields: dict[str, Any]) -> None:
    try:
        request_of({"type": kind, **fields})
    except ApiError as error:
        assert error.status == 400  # noqa: PT017

"""Odd items, tools and arguments: bodies are accepted or refused with 4xx, and items have the client's types."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseOutputItem
from pydantic import TypeAdapter

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.openai.input_items import list_items
from kimi_mlx.server.openai.response_store import StoredState
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_items import call_item, completed_call
from kimi_mlx.server.openai.responses_request import (
    MissingStateError,
    read_body,
    read_continued_body,
    read_tools,
    to_chat_request,
)
from kimi_mlx.server.openai.responses_response import ResponseFormatter
from kimi_mlx.server.openai.tool_table import ToolName
from kimi_mlx.server.openai.typed_tools import TYPED_TOOLS

ITEM_TYPES = (
    *("message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output", "reasoning"),
    *("compaction", "item_reference", "local_shell_call", "local_shell_call_output", "shell_call"),
    *("shell_call_output", "apply_patch_call", "apply_patch_call_output", "tool_search_call", "tool_search_output"),
    *("additional_tools", "web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call"),
    *("mcp_call", "mcp_list_tools", "mcp_approval_request", "computer_call", "computer_call_output", "unknown"),
)
TOOL_TYPES = ("function", "custom", "namespace", "local_shell", "shell", "apply_patch", "tool_search", "mcp", "unknown")
NAMES = (
    *("id", "call_id", "name", "namespace", "arguments", "input", "output", "role", "content", "summary", "action"),
    *("encrypted_content", "operation", "tools", "execution", "results", "queries", "status", "text", "parameters"),
    *("format", "environment", "server_label", "description", "strict", "command", "commands"),
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "f", "user", "client", "{}", '{"x": 1}'])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from((*NAMES, "type")), inner, max_size=3),
    max_leaves=6,
)


def objects(types: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    fields = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
    return st.builds(lambda kind, rest: {"type": kind, **rest}, st.sampled_from(types), fields)


TOOLS = objects(TOOL_TYPES) | st.builds(
    lambda tool, tools: {**tool, "tools": tools}, objects(("namespace",)), st.lists(objects(TOOL_TYPES), max_size=2)
)
CHOICES = st.sampled_from(["auto", "none", "required"]) | objects((*TOOL_TYPES, "allowed_tools"))


@given(st.lists(objects(ITEM_TYPES), max_size=5), st.lists(TOOLS, max_size=3), CHOICES)
def test_odd_bodies(items: list[Any], tools: list[Any], choice: Any) -> None:
    data = json.dumps({"input": items, "tools": tools, "tool_choice": choice}).encode()
    try:
        try:
            body, extended = read_body(ResponsesBody, data), StoredState().continued_body(data)
        except MissingStateError as error:
            item = b'{"type": "message", "role": "user", "content": "x"}'
            extended = StoredState(None, dict.fromkeys(error.item_ids, item)).continued_body(data)
            body, _ = read_continued_body(ResponsesBody, extended)
        _, state = read_continued_body(ResponsesBody, extended)
        to_chat_request(body, state)
    except ApiError as error:
        assert error.status < 500  # noqa: PT017
    else:
        json.dumps(ResponseFormatter("m", body, read_tools(body, state)).response("completed"))
        list_items("resp_1", None, extended)  # type: ignore[arg-type]


ARGUMENTS = st.dictionaries(st.sampled_from((*NAMES, "path", "diff", "type", "env", "timeout_ms")), VALUES, max_size=4)
OUTPUT_ITEM: TypeAdapter[ResponseOutputItem] = TypeAdapter(ResponseOutputItem)


@given(st.sampled_from(("function", "custom", *TYPED_TOOLS)), ARGUMENTS, st.sampled_from(["completed", "incomplete"]))
def test_odd_arguments_give_items_of_the_client_s_types(kind: str, arguments: Any, status: str) -> None:
    tool = ToolName(kind, "f", "n")
    item = {**call_item(tool, "call_1"), "status": "in_progress"}
    OUTPUT_ITEM.validate_python(item, strict=True)
    OUTPUT_ITEM.validate_python(completed_call(item, tool, json.dumps(arguments), status), strict=True)
    OUTPUT_ITEM.validate_python(completed_call(item, tool, "no JSON", status), strict=True)

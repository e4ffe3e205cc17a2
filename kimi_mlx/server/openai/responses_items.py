"""Items of tool calls in the output of the Responses API."""

from __future__ import annotations

import secrets
from typing import Any

from kimi_mlx.server.openai.custom_tools import decode_input
from kimi_mlx.server.openai.tool_table import ToolName
from kimi_mlx.server.openai.typed_tools import CALL_SUFFIX, TYPED_TOOLS, decode_object

Value = dict[str, Any]

ID_PREFIXES = {
    "function": "fc",
    "custom": "ctc",
    "local_shell": "lsh",
    "shell": "sh",
    "apply_patch": "apc",
    "tool_search": "tsc",
}
"""Prefixes of the ids of calls, by the type of the tool."""


def call_item(tool: ToolName, call_id: str) -> Value:
    """Return the item of a call that begins, without its status."""
    item: Value = {"id": f"{ID_PREFIXES[tool.type]}_{secrets.token_hex(12)}", "call_id": call_id}
    if tool.type in TYPED_TOOLS:
        return {"type": f"{tool.type}{CALL_SUFFIX}", **item, **TYPED_TOOLS[tool.type].to_fields({})}
    namespace = {"namespace": tool.namespace} if tool.namespace else {}
    if tool.type == "custom":
        return {"type": "custom_tool_call", **item, "name": tool.name, **namespace, "input": ""}
    return {"type": "function_call", **item, "name": tool.name, **namespace, "arguments": ""}


def completed_call(item: Value, tool: ToolName, arguments: str, status: str) -> Value:
    """Return the item of a call that has ended.

    Args:
        item: item at its beginning.
        tool: its tool.
        arguments: its arguments as the model wrote them.
        status: `completed` or `incomplete`.
    """
    if tool.type == "custom":
        text = decode_input(arguments, is_free_text=tool.is_free_text)
        return {**item, "input": text, "status": status}
    if tool.type == "apply_patch" and status == "incomplete":
        status = "in_progress"  # the API has no other status for a patch that is not complete
    if tool.type in TYPED_TOOLS:
        return {**item, **TYPED_TOOLS[tool.type].to_fields(decode_object(arguments)), "status": status}
    return {**item, "arguments": arguments, "status": status}

"""Tools of the Messages API, as functions for the model.

| type                                      | for the model                                        |
| ----------------------------------------- | ---------------------------------------------------- |
| none, custom, or any with a schema        | a function                                           |
| bash, text_editor, memory, computer       | a function with the schema that Anthropic documents  |
| all others, and `mcp_servers`             | nothing: most of them run at Anthropic               |
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from kimi_mlx.server.anthropic.client_tools import client_function
from kimi_mlx.server.anthropic.messages_body import CountBody, MessagesTool
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.request_fields import left_out_note, name_taken

HOSTED = ("web_search", "web_fetch", "code_execution", "tool_search_tool", "mcp_toolset", "mcp_servers", "advisor")
"""Beginnings of the types of tools that run at Anthropic."""


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Args:
        functions: tools in the format of Chat Completions.
        places: their locations in the body.
        notes: sentences about tools that are left out.
    """

    functions: tuple[dict[str, Any], ...]
    places: tuple[str, ...]
    notes: tuple[str, ...]


def read_tools(body: CountBody) -> Tools:
    """Return the tools of a body.

    Raises:
        ApiError: a tool lacks a field, or has a name that another one has.
    """
    functions: dict[str, dict[str, Any]] = {}  # by location
    places: dict[str, str] = {}  # by name
    left_out: defaultdict[str, list[str]] = defaultdict(list)  # by reason
    for index, tool in enumerate(body.tools or ()):
        place = f"tools[{index}]"
        function = _function(tool, place)
        if function is None:
            left_out[_reason(tool.type or "")].append(_label(tool))
            continue
        first = places.setdefault(function["name"], place)
        if first != place:
            raise name_taken(function["name"], place, first)
        functions[place] = {"type": "function", "function": function}
    if body.mcp_servers:
        left_out[_reason("mcp_servers")].append("mcp_servers")
    notes = tuple(left_out_note(labels, reason) for reason, labels in left_out.items())
    return Tools(tuple(functions.values()), tuple(functions), notes)


def _function(tool: MessagesTool, place: str) -> dict[str, Any] | None:
    """Return the function of a tool; None for a tool that is left out.

    Raises:
        ApiError: the tool has no name or no schema.
    """
    description, parameters = tool.description, tool.input_schema
    if parameters is None and tool.type not in (None, "custom"):
        known = client_function(tool)
        if known is None:
            return None
        description, parameters = known
    if parameters is None or not tool.name:
        raise ApiError(400, f"`{place}` has no {'`input_schema`' if tool.name else '`name`'}", param=place)
    function = {"name": tool.name, "description": description, "parameters": parameters, "strict": tool.strict}
    return {key: value for key, value in function.items() if value is not None}


def _reason(tool_type: str) -> str:
    return "they run at Anthropic" if tool_type.startswith(HOSTED) else "this server does not have them"


def _label(tool: MessagesTool) -> str:
    server = tool.mcp_server_name
    return f"{tool.type:.60}" + (f" `{server:.60}`" if server else "")

"""Convert the tools of the Responses API to functions for the model.

| type                              | for the model                                 | item of its calls   |
| --------------------------------- | --------------------------------------------- | ------------------- |
| function                          | the function                                  | function_call       |
| custom                            | a function with one text, or free text        | custom_tool_call    |
| namespace                         | its functions, as NAMESPACE__NAME             | as for a function   |
| local_shell, shell, apply_patch,  | a function with the fields of the item        | local_shell_call,   |
| tool_search (execution: client)   |                                               | shell_call, ...     |
| all others                        | nothing: they run at OpenAI                   |                     |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.openai.custom_tools import InputGrammar
from kimi_mlx.server.openai.responses_body import CustomToolFormat, OtherItem, ResponsesTool, ToolChoice
from kimi_mlx.server.openai.tool_table import ToolName, ToolTable, to_function
from kimi_mlx.server.openai.typed_tools import TOOL_SEARCH_OUTPUT, TYPED_TOOLS
from kimi_mlx.server.request_fields import check_tool_choice, missing_field, unsupported

Value = dict[str, Any]

SEPARATOR = "__"
"""Separates the name of a namespace from that of its tool, as in the names of MCP tools."""

ANY_OBJECT: Value = {"type": "object", "properties": {}}


def build_table(tools: Sequence[ResponsesTool], found: Sequence[ResponsesTool] = ()) -> ToolTable:
    """Return the tools of a request.

    Args:
        tools: tools of the request.
        found: tools that a search during the conversation has added; those that are in the table already are ignored.

    Raises:
        ApiError: a tool has no name, or a name that another one has, or a grammar without text.
    """
    table = ToolTable()
    for index, tool in enumerate(tools):
        _add(table, tool, f"tools[{index}]")
    for tool in found:
        _add(table, tool, "input", is_optional=True)
    return table


def _add(
    table: ToolTable, tool: ResponsesTool, place: str, namespace: ResponsesTool | None = None, is_optional: bool = False
) -> None:
    if tool.type == "namespace" and namespace is None:
        _check_name(tool, place)
        for index, inner in enumerate(tool.tools or ()):
            _add(table, inner, f"{place}.tools[{index}]", tool, is_optional)
    elif tool.type in ("function", "custom"):
        _check_name(tool, place)
        _add_named(table, tool, place, namespace, is_optional)
    elif tool.type in TYPED_TOOLS and _runs_at_client(tool):
        typed = TYPED_TOOLS[tool.type]
        function = to_function(typed.name, tool.description or typed.description, tool.parameters or typed.parameters)
        table.add(function, ToolName(tool.type, typed.name), place, is_optional=is_optional)
    else:
        label = getattr(tool, "server_label", None)
        table.leave_out(f"{tool.type:.60} `{label:.60}`" if isinstance(label, str) else f"{tool.type:.60}")


def _add_named(
    table: ToolTable, tool: ResponsesTool, place: str, namespace: ResponsesTool | None, is_optional: bool
) -> None:
    assert tool.name is not None
    name = model_name(tool.name, namespace.name if namespace else None)
    description = tool.description or ""
    if namespace is not None and namespace.description and tool is (namespace.tools or [])[0]:
        description = f"({namespace.name}: {namespace.description})\n{description}"
    named = ToolName(tool.type, tool.name, namespace.name if namespace else None)
    if tool.type == "function":
        function = to_function(name, description or None, tool.parameters or ANY_OBJECT, tool.strict)
        table.add(function, named, place, is_optional=is_optional)
    else:
        grammar = _grammar(tool.format, f"{place}.format")
        table.add_custom(name, description, grammar, named, place, is_optional=is_optional)


def _grammar(tool_format: CustomToolFormat | None, place: str) -> InputGrammar | None:
    """Return the grammar of a custom tool's input; None if its input is any text.

    Raises:
        ApiError: the format lacks a field.
    """
    if tool_format is None or tool_format.type == "text":
        return None
    if not tool_format.syntax:
        raise missing_field(f"{place}.syntax")
    if not tool_format.definition:
        raise missing_field(f"{place}.definition")
    return InputGrammar(tool_format.syntax, tool_format.definition, place)


def choose(table: ToolTable, choice: str | ToolChoice | None) -> str | dict[str, str]:
    """Return the tool choice of a ChatRequest; `allowed_tools` removes all other tools from the table.

    Raises:
        ApiError: the choice names a tool that the model cannot call.
    """
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        table.restrict({name for tool in choice.tools or () for name in [_chosen(table, tool)] if name is not None})
        choice = (choice.mode or "auto") if table.functions or choice.mode == "required" else "none"
    if choice is None or isinstance(choice, str):
        return check_tool_choice(choice or "auto", table.functions)
    name = _chosen(table, choice)
    if name is None:
        hint = "it names no function, custom tool or typed tool that the client runs"
        raise unsupported(f"`tool_choice` of type `{choice.type:.60}` is", "tool_choice", hint)
    return check_tool_choice({"name": name}, table.functions)


def _chosen(table: ToolTable, choice: ToolChoice) -> str | None:
    """Return the name of the function that a choice refers to; None for a tool that the model cannot call."""
    if choice.type in TYPED_TOOLS:
        return TYPED_TOOLS[choice.type].name
    name = choice.name or (choice.function.name if choice.function else None)
    if choice.type not in ("function", "custom") or not name:
        return None
    joined = model_name(name, choice.namespace)
    inside = [other for other, named in table.names.items() if named.name == name]
    return inside[0] if joined not in table.names and len(inside) == 1 else joined


def model_name(name: str, namespace: str | None) -> str:
    """Return the name of a tool for the model."""
    if not namespace:
        return name
    return namespace + name if namespace.endswith(SEPARATOR) else f"{namespace}{SEPARATOR}{name}"


def found_tools(items: Iterable[Any]) -> list[ResponsesTool]:
    """Return the tools that items of a conversation add: results of tool searches, and additional tools."""
    found: list[ResponsesTool] = []
    for item in items:
        if isinstance(item, OtherItem) and item.type in (TOOL_SEARCH_OUTPUT, "additional_tools"):
            tools = getattr(item, "tools", None)
            values = cast("list[Any]", tools) if isinstance(tools, list) else []
            found += [tool for value in values for tool in _parse_tool(value)]
    return found


def _parse_tool(value: Any) -> list[ResponsesTool]:
    try:
        tool = ResponsesTool.model_validate(value)
    except ValueError:  # of a tool that the model cannot call
        return []
    return [tool] if tool.type == "namespace" or tool.name else []


def _runs_at_client(tool: ResponsesTool) -> bool:
    """Return whether the client runs a typed tool. A shell may also run in a container, and a search, at OpenAI."""
    environment = getattr(tool, "environment", None)
    kind: Any = cast("Value", environment).get("type") if isinstance(environment, dict) else None
    if tool.type == "tool_search":
        return tool.execution == "client"
    return tool.type != "shell" or kind in (None, "local")


def _check_name(tool: ResponsesTool, place: str) -> None:
    if not tool.name:
        raise ApiError(400, f"`{place}` has no `name`", "missing_required_parameter", f"{place}.name")

"""Parse a tool call as Kimi writes it: `functions.NAME:INDEX` and JSON arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from kimi_mlx.text.messages import ToolCall, UnparsedToolCall

PREFIX = "functions."
INDEX = re.compile(r":\d+$")
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
NO_ARGUMENTS = "{}"

NAMESPACES = "(?:functions?|tools?|namespace|defaultapi|multitooluse)*"
"""Words that models write before a name, alone or several, without separators."""

SEPARATORS = re.compile(r"[\W_]+")
CLIENT_ID = re.compile(r"(?:call|toolu|tool|fc|chatcmpl)[\W_]", re.IGNORECASE)
"""Beginning of an id in the format of a client."""


def names_of(tools: Sequence[Mapping[str, Any]] | None) -> tuple[str, ...]:
    """Return the names of OpenAI-style tools."""
    functions = [cast("Mapping[str, Any] | None", tool.get("function")) for tool in tools or ()]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    return tuple(name for name in names if isinstance(name, str) and name)


def tool_name(call_id: str, tool_names: Collection[str] = ()) -> str:
    """Return the name of the tool in a call's id; empty if there is none.

    Kimi sometimes writes an id that differs from `functions.NAME:INDEX`: `functionsNAME5`, `functions_NAME_5`, `NAME`,
    `tools.functions.NAME` or `call_NAME_5`. If exactly one offered tool fits such an id, its name is returned.

    Args:
        call_id: id as the model wrote it.
        tool_names: names of the tools that the model may call.
    """
    name = INDEX.sub("", call_id.strip()).removeprefix(PREFIX)
    if not name or name in tool_names:
        return name
    fitting = _tools_with_this_name(call_id, tool_names) or _tools_named_inside(call_id, tool_names)
    return fitting[0] if len(fitting) == 1 else name


def _tools_with_this_name(call_id: str, tool_names: Collection[str]) -> list[str]:
    """Return the tools whose name, apart from case and separators, is all of the id between its prefix and index."""
    text = _letters(call_id)
    return [name for name in tool_names if re.fullmatch(rf"{NAMESPACES}{re.escape(_letters(name))}\d*", text)]


def _tools_named_inside(call_id: str, tool_names: Collection[str]) -> list[str]:
    """Return the tools whose name is a part of an id in the format of a client, without those inside a longer name."""
    if not CLIENT_ID.match(call_id.strip()):
        return []
    parts = f"_{SEPARATORS.sub('_', call_id.casefold())}_"
    folded = {name: f"_{SEPARATORS.sub('_', name.casefold())}_" for name in tool_names}
    inside = [name for name in tool_names if folded[name] in parts]
    return [name for name in inside if not any(folded[name] in folded[other] for other in inside if other != name)]


def _letters(text: str) -> str:
    return SEPARATORS.sub("", text.casefold())


def normalize_arguments(arguments: str) -> str:
    """Return the arguments of a call, with two forms that models and clients write corrected to a JSON object.

    Blank arguments and `null` become `{}`; an object that was encoded twice is decoded once. All other text is returned
    unchanged.
    """
    decoded = arguments
    try:
        while decoded.lstrip().startswith('"'):
            decoded = json.loads(decoded)
    except (ValueError, RecursionError):
        return arguments
    if decoded.strip() in ("", "null"):
        return NO_ARGUMENTS
    return arguments if decoded is arguments or _problem(decoded) else decoded


def parse_tool_call(
    call_id: str,
    arguments: str | None,
    is_cut_off: bool = False,
    index: int | None = None,
    tool_names: Collection[str] = (),
    free_text_tools: Collection[str] = (),
) -> ToolCall | UnparsedToolCall:
    """Return the call, or an UnparsedToolCall with the reason why it is not a call. Never raises.

    Args:
        call_id: text before the marker of the arguments, with or without `functions.` and the index.
        arguments: text after that marker; None if there is no marker.
        is_cut_off: True if the answer ended, or another call began, before this call was closed.
        index: index of its ToolCallDeltas.
        tool_names: names of the tools that the model may call.
        free_text_tools: names of those tools whose arguments are any text instead of JSON.
    """
    raw = call_id if arguments is None else call_id + ARGUMENT_BEGIN + arguments
    ending = "the call is not closed: " if is_cut_off else ""
    name = tool_name(call_id, tool_names)
    if arguments is None:
        return UnparsedToolCall(raw, f"{ending}no arguments", index)
    if not name:
        return UnparsedToolCall(raw, f"{ending}no tool name", index)
    problem = None if name in free_text_tools else _problem(arguments)
    if problem or (is_cut_off and name in free_text_tools):
        return UnparsedToolCall(raw, ending + (problem or "its text may be incomplete"), index)
    return ToolCall(call_id.strip(), name, arguments)


def read_tool_call(id: str, name: str, arguments: str, index: int) -> ToolCall | UnparsedToolCall:
    """Return a call from a server that has parsed its id, or an UnparsedToolCall if the arguments are not an object.

    Args:
        id: id of the call.
        name: name of the tool.
        arguments: arguments as the model wrote them.
        index: index of the call in the answer.
    """
    arguments = normalize_arguments(arguments)
    problem = _problem(arguments)
    if problem:
        return UnparsedToolCall(id + ARGUMENT_BEGIN + arguments, problem, index)
    return ToolCall(id, name, arguments)


def _problem(arguments: str) -> str | None:
    """Return the reason why `arguments` is not a JSON object; None if it is one."""
    try:
        value = json.loads(arguments, parse_constant=_refuse)
    except RecursionError:
        return "arguments are nested too deeply"
    except ValueError as error:
        return f"arguments are not JSON: {error}"
    return None if isinstance(value, dict) else "arguments are JSON but not an object"


def _refuse(constant: str) -> None:
    raise ValueError(f"`{constant}` is not a JSON value")

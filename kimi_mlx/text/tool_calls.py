"""Parse a tool call as Kimi writes it: `functions.NAME:INDEX` and JSON arguments."""

from __future__ import annotations

import json
import re

from kimi_mlx.text.messages import ToolCall, UnparsedToolCall

PREFIX = "functions."
INDEX = re.compile(r":\d+$")
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"


def tool_name(call_id: str) -> str:
    """Return the name in a call's id, with or without `functions.` and the index; empty if there is none."""
    return INDEX.sub("", call_id.strip()).removeprefix(PREFIX)


def parse_tool_call(
    call_id: str, arguments: str | None, is_cut_off: bool = False, index: int | None = None
) -> ToolCall | UnparsedToolCall:
    """Return the call, or an UnparsedToolCall with the reason why it is not a call. Never raises.

    Args:
        call_id: text before the marker of the arguments, with or without `functions.` and the index.
        arguments: text after that marker; None if there is no marker.
        is_cut_off: True if the answer ended, or another call began, before this call was closed.
        index: index of its ToolCallDeltas.
    """
    raw = call_id if arguments is None else call_id + ARGUMENT_BEGIN + arguments
    ending = "the call is not closed: " if is_cut_off else ""
    name = tool_name(call_id)
    if arguments is None:
        return UnparsedToolCall(raw, f"{ending}no arguments", index)
    if not name:
        return UnparsedToolCall(raw, f"{ending}no tool name", index)
    problem = _problem(arguments)
    if problem:
        return UnparsedToolCall(raw, ending + problem, index)
    return ToolCall(call_id.strip(), name, arguments)


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

"""One tool call as Kimi writes it, `functions.NAME:INDEX` and JSON arguments, made into a value."""

from __future__ import annotations

import json
import re

from kimi_mlx.text.messages import ToolCall, UnparsedToolCall

PREFIX = "functions."
INDEX = re.compile(r":\d+$")
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"


def tool_name(call_id: str) -> str:
    """Return the name in a call's id, with or without `functions.` and the index; empty if it names nothing."""
    return INDEX.sub("", call_id.strip()).removeprefix(PREFIX)


def parse_tool_call(
    call_id: str, arguments: str | None, is_cut_off: bool = False, index: int | None = None
) -> ToolCall | UnparsedToolCall:
    """Return the call, or what is there instead of one with the reason; never an error.

    Args:
        call_id: the text before the arguments' marker, with or without `functions.` and the index.
        arguments: the text after it; None if there was no marker.
        is_cut_off: the answer ended, or another call began, before this one was closed.
        index: that of its ToolCallDeltas.
    """
    raw = call_id if arguments is None else call_id + ARGUMENT_BEGIN + arguments
    ending = "the call is never closed: " if is_cut_off else ""
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
    """Return why `arguments` is not a JSON object, or None if it is one."""
    try:
        value = json.loads(arguments, parse_constant=_refuse)
    except RecursionError:
        return "arguments are nested too deeply"
    except ValueError as error:
        return f"arguments are not JSON: {error}"
    return None if isinstance(value, dict) else "arguments are JSON but not an object"


def _refuse(constant: str) -> None:
    raise ValueError(f"`{constant}` is no JSON value")

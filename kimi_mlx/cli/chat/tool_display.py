"""Tool calls and their results, for people."""

from __future__ import annotations

import json
from textwrap import indent

from kimi_mlx.text.messages import ToolCall, UnparsedToolCall
from kimi_mlx.units import format_count

MAX_ARGUMENT_LINES = 40
MAX_RESULT_LINES = 6
ONE_LINE = 60
"""Number of characters of arguments that still stand beside the name."""


def format_tool_call(call: ToolCall | UnparsedToolCall) -> str:
    """Return a call as text: the name with short arguments beside it, or longer ones indented below."""
    if isinstance(call, UnparsedToolCall):
        return f"broken tool call ({call.reason}):\n{indent(shorten_lines(call.raw, MAX_ARGUMENT_LINES), '  ')}"
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return f"{call.name}\n{indent(shorten_lines(call.arguments, MAX_ARGUMENT_LINES), '  ')}"
    if isinstance(arguments, dict):
        values = {str(key): json.dumps(value, ensure_ascii=False) for key, value in arguments.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        line = ", ".join(f"{key}: {value}" for key, value in values.items())
        if len(line) <= ONE_LINE:
            return f"{call.name}({line})"
    text = json.dumps(arguments, indent=2, ensure_ascii=False)
    return f"{call.name}\n{indent(shorten_lines(text, MAX_ARGUMENT_LINES), '  ')}"


def format_tool_result(text: str) -> str:
    """Return the first lines of a result, and how many more there are."""
    return shorten_lines(text.strip("\n"), MAX_RESULT_LINES) or "(no output)"


def shorten_lines(text: str, limit: int) -> str:
    """Return the first lines of a text, then a line that says how many more there are."""
    lines = text.splitlines()
    if len(lines) <= limit + 1:
        return "\n".join(lines)
    return "\n".join([*lines[:limit], f"… {format_count(len(lines) - limit, 'more line')}"])

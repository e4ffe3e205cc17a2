"""Tool calls and their results, for people."""

from __future__ import annotations

import json
from textwrap import indent
from typing import Any, cast

from kimi_mlx.text.messages import ToolCall, UnparsedToolCall
from kimi_mlx.units import format_count

MAX_ARGUMENT_LINES, MAX_ARGUMENT_LINE = 40, 1000
MAX_RESULT_LINES, MAX_RESULT_LINE = 6, 300
"""Number of lines of arguments and results that are shown, and of characters of a line."""
ONE_LINE = 60
"""Maximum number of characters of arguments that are shown beside the name."""


def format_tool_call(call: ToolCall | UnparsedToolCall) -> str:
    """Return a call as text: the name with short arguments beside it, or an indented line for each argument."""
    if isinstance(call, UnparsedToolCall):
        return f"broken tool call ({call.reason}):\n{_arguments(call.raw)}"
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return f"{call.name}\n{_arguments(call.arguments)}"
    if not isinstance(arguments, dict):
        return f"{call.name}\n{_arguments(_to_json(arguments))}"
    values = cast("dict[str, Any]", arguments)
    line = ", ".join(f"{name}: {_to_json(value)}" for name, value in values.items())
    if len(line) <= ONE_LINE and "\n" not in line:
        return f"{call.name}({line})"
    return f"{call.name}\n{_arguments(chr(10).join(_argument(name, value) for name, value in values.items()))}"


def format_tool_result(text: str) -> str:
    """Return the first lines of a result, and how many more there are."""
    return shorten_lines(text.strip("\n"), MAX_RESULT_LINES, MAX_RESULT_LINE) or "(no output)"


def shorten_lines(text: str, max_lines: int, max_line: int) -> str:
    """Return the beginning of a text, with the numbers of lines and characters that are left out."""
    lines = text.splitlines()
    shown = lines if len(lines) <= max_lines + 1 else lines[:max_lines]
    cut = [
        line if len(line) <= max_line else f"{line[:max_line]}… {format_count(len(line) - max_line, 'more character')}"
        for line in shown
    ]
    if len(shown) < len(lines):
        cut.append(f"… {format_count(len(lines) - len(shown), 'more line')}")
    return "\n".join(cut)


def _argument(name: str, value: object) -> str:
    """Return an argument; text of several lines as it is, indented."""
    if isinstance(value, str) and "\n" in value:
        return f"{name}:\n{indent(value, '  ')}"
    return f"{name}: {_to_json(value)}"


def _arguments(text: str) -> str:
    return indent(shorten_lines(text, MAX_ARGUMENT_LINES, MAX_ARGUMENT_LINE), "  ")


def _to_json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= ONE_LINE else json.dumps(value, ensure_ascii=False, indent=2)

"""Typed tools of the Responses API that clients run: shells, patches and tool search.

The model sees each as a function; its calls and results are items of a type of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

Value = dict[str, Any]


@dataclass(frozen=True)
class TypedTool:
    """A type of tool that the client runs, and whose calls have a type of item of their own.

    Args:
        name: name of the function for the model.
        description: its description, unless the tool has one.
        parameters: schema of its arguments, unless the tool has one.
        to_fields: function that returns the fields of a call's item for its arguments.
        to_arguments: function that returns the arguments of a call for the fields of its item.
    """

    name: str
    description: str
    parameters: Value
    to_fields: Callable[[Value], Value]
    to_arguments: Callable[[Value], Value]


def _shell_command(arguments: Value) -> Value:
    command, env = arguments.get("command"), arguments.get("env")
    words = ["bash", "-lc", command] if isinstance(command, str) else _strings(command)
    variables = cast("Value", env) if isinstance(env, dict) else {}
    fields: Value = {"command": words, "env": {name: str(value) for name, value in variables.items()}}
    fields |= {"timeout_ms": _integer(arguments.get("timeout_ms"))}
    fields |= {name: _string(arguments.get(name)) for name in ("user", "working_directory")}
    return {"action": {"type": "exec", **fields}}


def _shell_commands(arguments: Value) -> Value:
    commands = arguments.get("commands")
    lines = [commands] if isinstance(commands, str) else _strings(commands)
    limits = {name: _integer(arguments.get(name)) for name in ("timeout_ms", "max_output_length")}
    return {"action": {"commands": lines, **limits}}


def _operation(arguments: Value) -> Value:
    kind = arguments.get("type")
    fields = {name: _string(arguments.get(name)) or "" for name in ("path", "diff")}
    return {"operation": {"type": kind if kind in PATCH_TYPES else "update_file", **fields}}


def _strings(value: Any) -> list[str]:
    values = cast("list[Any]", value) if isinstance(value, list) else []
    return [word if isinstance(word, str) else json.dumps(word) for word in values]


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _action(item: Value) -> Value:
    action = cast("Value", item.get("action")) if isinstance(item.get("action"), dict) else {}
    return {name: value for name, value in action.items() if value not in (None, {}) and name != "type"}


def object_schema(properties: Value, *required: str) -> Value:
    """Return the JSON schema of an object."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


PATCH_TYPES = ("create_file", "update_file", "delete_file")
MILLISECONDS: Value = {"type": "integer", "minimum": 0, "description": "Time limit in milliseconds"}

TYPED_TOOLS = {
    "local_shell": TypedTool(
        "local_shell",
        "Run a command on the user's machine and return its output.",
        object_schema(
            {
                "command": {"type": "array", "items": {"type": "string"}, "description": "Program and its arguments"},
                "working_directory": {"type": "string"},
                "timeout_ms": MILLISECONDS,
                "env": {"type": "object", "additionalProperties": {"type": "string"}},
            },
            "command",
        ),
        _shell_command,
        _action,
    ),
    "shell": TypedTool(
        "shell",
        "Run shell commands on the user's machine and return their output.",
        object_schema(
            {
                "commands": {"type": "array", "items": {"type": "string"}, "description": "Lines for the shell"},
                "timeout_ms": MILLISECONDS,
                "max_output_length": {"type": "integer", "minimum": 0, "description": "Limit in characters"},
            },
            "commands",
        ),
        _shell_commands,
        _action,
    ),
    "apply_patch": TypedTool(
        "apply_patch",
        "Create, update or delete a file. The diff of a file has lines that begin with ` `, `+` or `-`, in hunks that "
        "begin with `@@`; a new file has only lines with `+`.",
        object_schema(
            {
                "type": {"enum": list(PATCH_TYPES)},
                "path": {"type": "string"},
                "diff": {"type": "string"},
            },
            "type",
            "path",
        ),
        _operation,
        lambda item: cast("Value", item.get("operation")) if isinstance(item.get("operation"), dict) else {},
    ),
    "tool_search": TypedTool(
        "tool_search",
        "Find further tools.",
        object_schema({"query": {"type": "string"}}, "query"),
        lambda arguments: {"arguments": arguments, "execution": "client"},
        lambda item: cast("Value", item.get("arguments")) if isinstance(item.get("arguments"), dict) else {},
    ),
}
"""Typed tools that clients run, by type."""

CALL_SUFFIX, OUTPUT_SUFFIX = "_call", "_call_output"
TOOL_SEARCH_OUTPUT = "tool_search_output"


def decode_object(arguments: str) -> Value:
    """Return the arguments of a typed tool; empty if they are not an object."""
    try:
        value: Any = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return cast("Value", value) if isinstance(value, dict) else {}

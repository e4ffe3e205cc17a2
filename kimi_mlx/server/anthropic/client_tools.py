"""Anthropic's tools that clients run, as functions for the model: a shell, an editor, a memory folder and a screen.

A request has only their types, because Anthropic's models know their inputs. The versions of a tool, whose dates are
part of the type, differ in few fields.

Source: https://platform.claude.com/docs/en/agents-and-tools/tool-use, the pages about these tools.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kimi_mlx.server.anthropic.messages_body import MessagesTool

Value = dict[str, Any]

TYPE = re.compile(r"(bash|text_editor|memory|computer)_([0-9]{8})")

RENAMED_EDITOR = "20250429"
"""First version of the editor that inserts `insert_text`, not `new_str`, and has no `undo_edit`."""

EXTENDED_COMPUTER = "20250124"
"""First version of the computer that scrolls, waits and holds keys."""


def client_function(tool: MessagesTool) -> tuple[str, Value] | None:
    """Return the description of a tool and the schema of its input; None if the tool is not one of these."""
    match = TYPE.fullmatch(tool.type or "")
    return FAMILIES[match[1]](tool, match[2]) if match else None


def _bash(tool: MessagesTool, version: str) -> tuple[str, Value]:
    properties = {
        "command": _text("Command to run"),
        "restart": {"type": "boolean", "description": "True restarts the shell instead"},
    }
    description = "Run a command in a bash shell on the user's machine, which keeps its state, and return its output."
    schema = {"type": "object", "properties": properties, "required": ["command"], "additionalProperties": False}
    return description, schema


def _editor(tool: MessagesTool, version: str) -> tuple[str, Value]:
    description = "View, create and edit text files."
    if tool.max_characters:
        description += f" A view shows at most {tool.max_characters} characters of a file."
    if version >= RENAMED_EDITOR:
        return description, _choice_of("command", FILE_COMMANDS, FILE_FIELDS)
    commands = FILE_COMMANDS | {"insert": ("path", "insert_line", "new_str"), "undo_edit": ("path",)}
    fields = {name: field for name, field in FILE_FIELDS.items() if name != "insert_text"}
    return description, _choice_of("command", commands, fields | {"new_str": _text("str_replace, insert: new text")})


def _memory(tool: MessagesTool, version: str) -> tuple[str, Value]:
    description = (
        "View and edit the files in the folder `/memories`, which stays between conversations. View the folder before "
        "you begin with a task: it may have notes of earlier work. Keep what later conversations need in it."
    )
    commands = FILE_COMMANDS | {"delete": ("path",), "rename": ("old_path", "new_path")}
    fields = FILE_FIELDS | {"old_path": _text("rename: present path"), "new_path": _text("rename: new path")}
    paths = {name: {**fields[name], "pattern": "^/memories"} for name in ("path", "old_path", "new_path")}
    return description, _choice_of("command", commands, fields | paths)


def _computer(tool: MessagesTool, version: str) -> tuple[str, Value]:
    description = "See and control the screen, mouse and keyboard of a computer."
    if tool.display_width_px and tool.display_height_px:
        description += f" The screen has {tool.display_width_px} x {tool.display_height_px} pixels."
    if version < EXTENDED_COMPUTER:
        fields = {name: SCREEN_FIELDS[name] for name in ("text", "coordinate")}
        return description, _choice_of("action", FIRST_ACTIONS, fields)
    if not tool.enable_zoom:
        return description, _choice_of("action", ACTIONS, SCREEN_FIELDS)
    region = {"region": _integers(4, "zoom: left, top, right and bottom edge in pixels")}
    return description, _choice_of("action", ACTIONS | {"zoom": ("region",)}, SCREEN_FIELDS | region)


def _choice_of(selector: str, commands: Mapping[str, Sequence[str]], fields: Value) -> Value:
    """Return the schema of an input that is one of several commands.

    Args:
        selector: name of the field with the name of the command.
        commands: names of the commands, each with the names of its required fields.
        fields: schemas of the other fields.
    """
    alternatives = [
        {"properties": {selector: {"const": command}}, "required": [selector, *required]}
        for command, required in commands.items()
    ]
    return {
        "type": "object",
        "properties": {selector: {"type": "string", "enum": [*commands]}, **fields},
        "required": [selector],
        "additionalProperties": False,
        "anyOf": alternatives,
    }


def _text(description: str) -> Value:
    return {"type": "string", "description": description}


def _integer(description: str) -> Value:
    return {"type": "integer", "minimum": 0, "description": description}


def _integers(count: int, description: str) -> Value:
    items = {"type": "integer"}
    return {"type": "array", "items": items, "minItems": count, "maxItems": count, "description": description}


FAMILIES: dict[str, Callable[[MessagesTool, str], tuple[str, Value]]] = {
    "bash": _bash,
    "text_editor": _editor,
    "memory": _memory,
    "computer": _computer,
}

FILE_COMMANDS: dict[str, tuple[str, ...]] = {
    "view": ("path",),
    "create": ("path", "file_text"),
    "str_replace": ("path", "old_str", "new_str"),
    "insert": ("path", "insert_line", "insert_text"),
}
FILE_FIELDS: Value = {
    "path": _text("Absolute path of the file; for view also of a folder"),
    "view_range": _integers(2, "view: first and last line, counted from 1; -1 is the end of the file"),
    "file_text": _text("create: content of the file"),
    "old_str": _text("str_replace: text to replace, exactly as in the file, where it must be unique"),
    "new_str": _text("str_replace: new text"),
    "insert_line": _integer("insert: number of the line after which the text goes; 0 is the beginning"),
    "insert_text": _text("insert: new text"),
}

CLICKS = ("left_click", "right_click", "middle_click", "double_click")
FIRST_ACTIONS: dict[str, tuple[str, ...]] = {
    "key": ("text",),
    "type": ("text",),
    "mouse_move": ("coordinate",),
    "left_click_drag": ("coordinate",),
    **dict.fromkeys((*CLICKS, "screenshot", "cursor_position"), ()),
}
ACTIONS = FIRST_ACTIONS | {
    "left_click_drag": ("start_coordinate", "coordinate"),
    "hold_key": ("text", "duration"),
    "scroll": ("scroll_direction", "scroll_amount"),
    "wait": ("duration",),
    **dict.fromkeys(("triple_click", "left_mouse_down", "left_mouse_up"), ()),
}
SCREEN_FIELDS: Value = {
    "text": _text("type: text to write; key, hold_key: key or combination, such as `Return` or `ctrl+s`"),
    "coordinate": _integers(2, "Place of the action: pixels from the left and from the top"),
    "start_coordinate": _integers(2, "left_click_drag: place where the drag begins"),
    "duration": _integer("hold_key, wait: seconds"),
    "scroll_direction": {"type": "string", "enum": ["up", "down", "left", "right"], "description": "scroll: direction"},
    "scroll_amount": _integer("scroll: number of steps of the mouse wheel"),
}

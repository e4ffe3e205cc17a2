"""Declare the tools of all servers to the model: names that Kimi can write, and schemas that constrain its calls."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from kimi_mlx.errors import GrammarError
from kimi_mlx.text.schema_bounds import MAX_TOOLS, MAX_TOTAL_CHARS, check_value

MAX_NAME = 64
"""Maximum length of a name: that of the OpenAI API."""

MAX_DESCRIPTION = 4_000
"""Maximum number of characters of a description; the rest is cut off."""

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")
_ORDER = {"type": 0, "description": 1, "properties": 2, "required": 3}
"""Order of the keys of a schema, which is the same for all servers; the others follow in their own order."""
_SCHEMA_TABLES = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties")


@dataclass(frozen=True)
class ServerTool:
    """A tool as its server declares it.

    Attributes:
        server: name of the server.
        name: name on the server.
        description: what it does.
        schema: JSON schema of its arguments.
    """

    server: str
    name: str
    description: str = ""
    schema: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)


@dataclass(frozen=True)
class DeclaredTool:
    """A tool as the model sees it.

    Attributes:
        name: name that the model writes.
        tool: tool on its server.
        declaration: the tool in OpenAI's format.
        note: what of its schema a grammar cannot enforce, and why; empty if it enforces all of it.
    """

    name: str
    tool: ServerTool
    declaration: Mapping[str, Any] = field(repr=False)
    note: str = ""


def declare(tools: Sequence[ServerTool]) -> tuple[list[DeclaredTool], list[str]]:
    """Return the tools for the model, and notes for the user about those that are left out."""
    declared: list[DeclaredTool] = []
    notes: list[str] = []
    num_chars = 0
    for name, tool in zip(assign_names(tools), tools, strict=True):
        entry = _declare(name, tool)
        try:
            num_chars += check_value(entry.declaration, name)
        except GrammarError as error:
            notes.append(f"tool `{name}` is left out: {error.message}")
            continue
        if len(declared) == MAX_TOOLS or num_chars > MAX_TOTAL_CHARS:
            notes.append(f"tool `{name}` and those after it are left out: there are too many tools for one model")
            break
        declared.append(entry)
    return declared, notes


def assign_names(tools: Sequence[ServerTool]) -> list[str]:
    """Return a name for each tool that Kimi can write, all different.

    It is the tool's own name, with `_` for characters that are not allowed. If several tools have it, it is
    `SERVER__TOOL`; if that is not enough, a number follows.
    """
    own = [_valid(tool.name) for tool in tools]
    counts = Counter(own)
    wanted = [
        name if counts[name] == 1 else _valid(f"{tool.server}__{tool.name}")
        for name, tool in zip(own, tools, strict=True)
    ]
    names: list[str] = []
    for name in wanted:
        number, unique = 1, name
        while unique in names:
            number += 1
            unique = f"{name[: MAX_NAME - 4]}_{number}"
        names.append(unique)
    return names


def _valid(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)[:MAX_NAME].strip("_-") or "tool"


def _declare(name: str, tool: ServerTool) -> DeclaredTool:
    parameters = without_titles(tool.schema)
    function = {"name": name, "description": tool.description[:MAX_DESCRIPTION], "parameters": parameters}
    return DeclaredTool(name, tool, {"type": "function", "function": function}, _not_enforced(parameters))


def _not_enforced(schema: Mapping[str, Any]) -> str:
    """Return the keywords of a schema that are not enforced, with reasons."""
    from kimi_mlx.text.tool_arguments import arguments_grammar

    try:
        check_value(schema, "schema")
    except GrammarError as error:
        return error.message
    _, problems = arguments_grammar(schema)
    return "; ".join(f"`${path}`: {problem}" for path, problem in problems)


def without_titles(schema: Any) -> Any:
    """Return a schema in a common order, without `$schema` and titles, which servers generate and which cost tokens."""
    if isinstance(schema, list):
        return [without_titles(item) for item in cast("list[Any]", schema)]
    if not isinstance(schema, Mapping):
        return schema
    table = cast("Mapping[str, Any]", schema)
    kept: dict[str, Any] = {}
    for key, value in sorted(table.items(), key=lambda item: _ORDER.get(item[0], len(_ORDER))):
        if key == "$schema" or (key == "title" and isinstance(value, str)):
            continue
        if key in _SCHEMA_TABLES and isinstance(value, Mapping):
            properties = cast("Mapping[str, Any]", value)
            kept[key] = {name: without_titles(item) for name, item in properties.items()}
        else:
            kept[key] = without_titles(value) if key in (*_SCHEMA_LISTS, *_SCHEMAS) else value
    return kept


def fingerprint(tool: ServerTool) -> str:
    """Return a text that differs if anything that the tool declares differs; a permission is for one fingerprint."""
    return json.dumps([tool.server, tool.name, tool.description, tool.schema], sort_keys=True, default=str)


def changes(before: Iterable[ServerTool], after: Iterable[ServerTool]) -> str:
    """Describe how the tools of a server have changed: `+new -removed ~changed`; empty if they have not."""
    old = {tool.name: fingerprint(tool) for tool in before}
    new = {tool.name: fingerprint(tool) for tool in after}
    marks = [f"+{name}" for name in new if name not in old]
    marks += [f"-{name}" for name in old if name not in new]
    marks += [f"~{name}" for name in new if name in old and new[name] != old[name]]
    return " ".join(marks)

"""Write tool declarations in the form that Kimi K2.5 was trained on: a block of TypeScript types.

JSON schemas of OpenAI-style tools become `type NAME = (_: PARAMETERS) => any;` inside one namespace. A schema that the
official encoder cannot express raises `ToolDeclarationError`; the caller then declares all tools as compact JSON, as
the official tokenizer does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from kimi_mlx.errors import TextError

INDENT = "  "
MAX_DEPTH = 64
ROOT_REF = "#"
DEFS_PREFIX = "#/$defs/"
ROOT_INTERFACE = "parameters"

# Constraints that the official encoder writes as comments, by type.
CONSTRAINTS: dict[str, tuple[str, ...]] = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
UNION_MEMBERS = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
ENUM_VALUES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}


class ToolDeclarationError(TextError):
    """A tool schema that has no TypeScript form; declare the tools as JSON instead."""


def to_typescript(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the TypeScript block for `tools`; an empty string if there is no function.

    Args:
        tools: OpenAI-style tools, `{"type": "function", "function": {"name", "description", "parameters"}}`.

    Raises:
        ToolDeclarationError: one of the schemas has no TypeScript form.
    """
    functions: list[str] = []
    for tool in tools:
        function = tool.get("function") if tool.get("type") == "function" else None
        if function:
            try:
                functions.append(_function(_mapping(function, "function")))
            except (ValueError, RecursionError) as error:  # a number or a value that Python cannot write
                raise ToolDeclarationError(f"tool schema has a value without TypeScript form: {error}") from error
    if not functions:
        return ""
    return "\n".join(["# Tools", "", "## functions", "namespace functions {", *functions, "}", ""])


def _function(function: Mapping[str, Any]) -> str:
    """Return the interfaces, the description and the type of one function."""
    writer = _SchemaWriter()
    root = _mapping(function.get("parameters") or {}, "parameters")
    parameters = writer.object_type(root, "", 0)
    blocks: list[str] = []
    if writer.refers_to_root:
        blocks.append(writer.root_interface(root))
        parameters = ROOT_INTERFACE
    blocks += [writer.interface(name, schema) for name, schema in list(writer.definitions.items())]
    description = _text(function.get("description") or "", "description")
    if description:
        blocks.append(_comment(description, ""))
    blocks.append(f"type {function.get('name', 'function')} = (_: {parameters}) => any;")
    return "\n".join(blocks)


@dataclass
class _SchemaWriter:
    """Writes the schemas of one function and collects the definitions that they refer to."""

    definitions: dict[str, Any] = field(default_factory=dict[str, Any])
    refers_to_root: bool = False

    def root_interface(self, root: Mapping[str, Any]) -> str:
        """Write the interface of parameters that contain themselves; the fields are in the schema's order."""
        fields = self._fields(root, INDENT, 0)
        body = ",\n".join(fields.values())
        return f"interface {ROOT_INTERFACE} {{\n{body}\n}}" if body else f"interface {ROOT_INTERFACE} {{}}"

    def interface(self, name: str, schema: Any) -> str:
        """Write one entry of `$defs`."""
        body = self.type_of(_mapping(schema, name), "", 0)
        description = _description(schema)
        head = _comment(description, "") + "\n" if description else ""
        return f"{head}interface {name} {body}"

    def type_of(self, schema: Any, indent: str, depth: int) -> str:
        """Return the type of a schema; `indent` is the indentation of its first line."""
        if depth > MAX_DEPTH:
            raise ToolDeclarationError(f"tool schema is nested deeper than {MAX_DEPTH} levels")
        if isinstance(schema, bool):
            return "any" if schema else "null"
        schema = _mapping(schema, "schema")
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            members = _list(schema["anyOf"], "anyOf")
            return " | ".join([self.type_of(member, indent, depth + 1) for member in members])
        if "enum" in schema:
            return _enum(schema)
        if not schema:
            return "any"
        kind = schema.get("type")
        if isinstance(kind, list):
            return _union(cast("list[Any]", kind))
        if kind == "object":
            return self.object_type(schema, indent, depth)
        if kind == "array":
            return self._array(schema, indent, depth)
        return _scalar(kind)

    def object_type(self, schema: Mapping[str, Any], indent: str, depth: int) -> str:
        """Return an object type: required fields first, each group by name, then additional properties."""
        self._define(schema)
        inner = indent + INDENT
        # Additional properties first: they may define types that the fields refer to.
        additional = self._additional(schema.get("additionalProperties"), inner, depth)
        fields = self._fields(schema, inner, depth)
        required = _list(schema.get("required", []), "required")
        names = sorted(fields, key=lambda name: (name not in required, name))
        lines = [fields[name] for name in names]
        if additional is not None:
            lines.append(f"{inner}[k: string]: {additional}")
        if not lines:
            return "{}"
        body = ",\n".join(lines)
        return f"{{\n{body}\n{indent}}}"

    def _define(self, schema: Mapping[str, Any]) -> None:
        for name, definition in _mapping(schema.get("$defs") or {}, "$defs").items():
            self.definitions[name] = definition

    def _fields(self, schema: Mapping[str, Any], indent: str, depth: int) -> dict[str, str]:
        """Return each property's comment and declaration, by name, in the schema's order."""
        properties = _mapping(schema.get("properties", {}), "properties")
        required = _list(schema.get("required", []), "required")
        fields: dict[str, str] = {}
        for name, prop in properties.items():
            mark = "" if name in required else "?"
            comment = _docs(prop, indent) + _default(prop, indent)
            fields[name] = f"{comment}{indent}{name}{mark}: {self.type_of(prop, indent, depth + 1)}"
        return fields

    def _additional(self, value: Any, indent: str, depth: int) -> str | None:
        if value is None:
            return None
        if isinstance(value, bool):
            return "any" if value else "never"
        return self.type_of(value, indent, depth + 1)

    def _array(self, schema: Mapping[str, Any], indent: str, depth: int) -> str:
        items: Any = schema.get("items") or {}
        inner = indent + INDENT
        docs = _docs(items, inner)
        if not docs:
            return f"Array<{self.type_of(items, indent, depth + 1)}>"
        return f"Array<\n{docs}{inner}{self.type_of(items, inner, depth + 1)}\n{indent}>"

    def _reference(self, ref: Any) -> str:
        if ref == ROOT_REF:
            self.refers_to_root = True
            return ROOT_INTERFACE
        name = str(ref).rsplit("/", 1)[-1]
        if not str(ref).startswith(DEFS_PREFIX) or name not in self.definitions:
            raise ToolDeclarationError(f"tool schema refers to `{ref}`, which is not defined")
        _mapping(self.definitions[name], name)
        return name


def _scalar(kind: Any) -> str:
    if kind == "integer":
        return "number"
    if isinstance(kind, str):
        return kind  # an unknown name passes through, as in the official encoder
    raise ToolDeclarationError(f"tool schema has a type without TypeScript form: `{kind}`")


def _union(kinds: list[Any]) -> str:
    members = [UNION_MEMBERS.get(kind) if isinstance(kind, str) else None for kind in kinds]
    if None in members:
        raise ToolDeclarationError(f"tool schema has an unknown type: `{kinds[members.index(None)]}`")
    return " | ".join(member for member in members if member is not None)


def _enum(schema: Mapping[str, Any]) -> str:
    values = _list(schema["enum"], "enum")
    expected = ENUM_VALUES.get(_enum_kind(schema.get("type")))
    for value in values:
        if value is not None and expected is not None and not isinstance(value, expected):
            raise ToolDeclarationError(f"enum value `{value}` is not of the declared type `{schema['type']}`")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def _enum_kind(kind: Any) -> str:
    """Return the declared type of an enum; a second type may only be null."""
    if not isinstance(kind, list):
        return str(kind)
    kinds = [str(k) for k in cast("list[Any]", kind)]
    others = [k for k in kinds if k != "null"]
    if not kinds or len(kinds) > 2 or (len(kinds) == 2 and len(others) == 2):
        raise ToolDeclarationError(f"an enum of the types {kinds} has no TypeScript form")
    return others[0] if others else "null"


def _docs(schema: Any, indent: str) -> str:
    """Return the comment lines of a schema: its description, then its constraints."""
    if not isinstance(schema, Mapping):
        return ""
    schema = cast("Mapping[str, Any]", schema)
    description = _description(schema)
    docs = _comment(description, indent) + "\n" if description else ""
    # References, unions and enums carry a description only.
    plain = not any(key in schema for key in ("$ref", "anyOf", "enum"))
    kind = schema.get("type")
    keys = CONSTRAINTS.get(kind, ()) if plain and isinstance(kind, str) else ()
    constraints = ", ".join(f"{key}: {schema[key]}" for key in keys if key in schema)
    return docs + (f"{indent}// {constraints}\n" if constraints else "")


def _default(schema: Any, indent: str) -> str:
    default = cast("Mapping[str, Any]", schema).get("default") if isinstance(schema, Mapping) else None
    if default is None:
        return ""
    text = repr(default) if isinstance(default, int | float) else json.dumps(default, ensure_ascii=False)
    return f"{indent}// Default: {text}\n"


def _description(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        return ""
    return _text(cast("Mapping[str, Any]", schema).get("description") or "", "description")


def _comment(text: str, indent: str) -> str:
    return "\n".join(f"{indent}// {line}" if line else "" for line in text.split("\n"))


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ToolDeclarationError(f"`{name}` of a tool is not an object")
    return cast("Mapping[str, Any]", value)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ToolDeclarationError(f"`{name}` of a tool is not a list")
    return list(cast("Sequence[Any]", value))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ToolDeclarationError(f"`{name}` of a tool is not a string")
    return value

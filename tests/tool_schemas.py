"""Schemas of tools' arguments, one list per kind: what clients and generators of schemas send."""

from __future__ import annotations

from typing import Any

from kimi_mlx.server.anthropic.client_tools import client_function
from kimi_mlx.server.anthropic.messages_body import MessagesTool

Schema = dict[str, Any]


def arguments(**properties: Any) -> Schema:
    """Return the schema of an object whose properties are all required, without others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT: Schema = {"type": "string", "maxLength": 12}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 99}

KINDS: dict[str, list[Schema]] = {
    "types": [
        arguments(a=TEXT, b=COUNT, c={"type": "number", "minimum": -1, "maximum": 1}, d={"type": "boolean"}),
        arguments(
            a={"type": "null"},
            b={"type": "array", "items": COUNT, "maxItems": 3},
            c={"type": "object", "maxProperties": 0},
        ),
        arguments(a={}),
        {},
        {"type": "object"},
        {"properties": {"a": TEXT}, "required": ["a"], "additionalProperties": False},
    ],
    "types in lists": [
        arguments(a={"type": ["string", "null"], "maxLength": 5}),
        arguments(a={"type": ["integer"], "minimum": 3, "maximum": 7}),
        arguments(a={"type": ["boolean", "array"], "items": {"type": ["null"]}, "maxItems": 2}),
        {**arguments(a={"type": ["string"], "maxLength": 4}), "type": ["object", "null"]},
    ],
    "types below combinations": [
        arguments(a={"anyOf": [{"type": "boolean"}, {"type": "null"}]}),
        {"anyOf": [arguments(a=COUNT), arguments(b={"type": "boolean"})]},
        arguments(a={"items": COUNT, "type": "array", "maxItems": 2}),
        {"allOf": [{"properties": {"a": COUNT}, "required": ["a"]}, {"maxProperties": 1}], "type": "object"},
    ],
    "required": [
        {"type": "object", "properties": {"a": COUNT, "b": COUNT}, "required": ["b"], "additionalProperties": False},
        {
            "type": "object",
            "properties": {"a": COUNT, "b": COUNT, "c": COUNT},
            "additionalProperties": False,
            "required": [],
        },
        arguments(
            **{
                "with space": COUNT,
                'q"uote': COUNT,
                "tab\tname": COUNT,
                "名前": COUNT,
                "👍🏽": COUNT,
                " ": COUNT,
                "a/b~c": COUNT,
            }
        ),
        {
            "type": "object",
            "properties": {"a": arguments(b=arguments(c=COUNT))},
            "required": ["a"],
            "additionalProperties": False,
        },
    ],
    "references": [
        {"$defs": {"n": COUNT}, **arguments(a={"$ref": "#/$defs/n"}, b={"$ref": "#/$defs/n"})},
        {
            "definitions": {"n": {"$ref": "#/definitions/m"}, "m": {"type": "boolean"}},
            **arguments(a={"$ref": "#/definitions/n"}),
        },
        {"$defs": {"a~b/c": COUNT}, **arguments(a={"$ref": "#/$defs/a~0b~1c"})},
        arguments(a=COUNT, b={"$ref": "#/properties/a"}),
    ],
    "recursive references": [
        {
            "$defs": {
                "tree": {
                    **arguments(v=COUNT),
                    "properties": {
                        "v": COUNT,
                        "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                    },
                }
            },
            **arguments(root={"$ref": "#/$defs/tree"}),
        },
        arguments(a=COUNT, next={"anyOf": [{"type": "null"}, {"$ref": "#"}]}),
        {
            "$defs": {"endless": arguments(again={"$ref": "#/$defs/endless"})},
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/endless"}, "b": COUNT},
            "required": ["b"],
            "additionalProperties": False,
        },
    ],
    "nested definitions": [
        {
            "$defs": {"box": {"$defs": {"unused": TEXT}, **arguments(size={"$ref": "#/$defs/size"})}, "size": COUNT},
            **arguments(box={"$ref": "#/$defs/box"}),
        },
        {
            "$defs": {"list": {"type": "array", "items": arguments(a=COUNT), "maxItems": 1}},
            **arguments(a={"$ref": "#/$defs/list/items"}),
        },
    ],
    "ranges": [
        arguments(a={"type": "integer", "minimum": -3, "maximum": -3}),
        arguments(a={"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12}),
        arguments(a={"type": "number", "minimum": -0.5, "maximum": 0.5}),
        arguments(a={"type": "integer", "minimum": 10**15, "maximum": 10**16}),
        arguments(a={"type": "string", "minLength": 5, "maxLength": 5}),
        arguments(a={"type": "string", "maxLength": 5_000_000}),
        arguments(a={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}),
        arguments(a={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50}),
        arguments(a={"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 2}),
    ],
    "values": [
        arguments(a={"enum": ["red", "", " x", "\n", "é\u0001"]}),
        arguments(a={"enum": [1, 2.5, None, True, [1], {"b": []}]}),
        arguments(a={"const": {"b": [1, {"c": None}]}}),
        arguments(a={"type": ["string", "null"], "enum": ["on", None]}),
    ],
    "anyOf": [
        arguments(a={"anyOf": [arguments(x=COUNT), arguments(y=COUNT), {"type": "null"}]}),
        arguments(a={"anyOf": [{"const": 1}, {"const": "one"}]}, b=COUNT),
        {
            "type": "object",
            "properties": {"a": COUNT, "b": COUNT},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            "additionalProperties": False,
        },
    ],
    "oneOf": [
        arguments(a={"oneOf": [{"type": "boolean"}, COUNT]}),
        arguments(a={"oneOf": [arguments(kind={"const": "x"}, v=COUNT), arguments(kind={"const": "y"})]}),
    ],
    "other names": [
        {"type": "object", "additionalProperties": COUNT, "maxProperties": 2},
        {
            "type": "object",
            "properties": {"a": COUNT},
            "required": ["a"],
            "additionalProperties": {"type": "boolean"},
            "maxProperties": 2,
        },
        {"type": "object", "patternProperties": {"^n[0-9]$": COUNT}, "additionalProperties": False},
    ],
    "rewritten": [
        {
            "type": "object",
            "properties": {"a": COUNT, "b": COUNT},
            "dependentRequired": {"a": ["b"]},
            "additionalProperties": False,
        },
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": COUNT},
        {"type": "object", "propertyNames": {"pattern": "^k[0-9]$"}, "additionalProperties": COUNT},
        arguments(a={"type": "array", "items": {"enum": ["r", "w", "x"]}, "uniqueItems": True, "minItems": 1}),
        arguments(a={"type": ["integer", "boolean", "null"], "not": {"type": "null"}, "minimum": 0, "maximum": 9}),
        arguments(a={"enum": [1, 2, 3], "not": {"const": 2}}),
        {
            **arguments(mode={"enum": ["all", "one"]}),
            "properties": {"mode": {"enum": ["all", "one"]}, "id": COUNT},
            "if": {"properties": {"mode": {"const": "one"}}},
            "then": {"required": ["id"]},
            "else": {"properties": {"id": False}},
        },
        {
            "type": "object",
            "properties": {"a": COUNT, "b": COUNT},
            "not": {"required": ["a", "b"]},
            "additionalProperties": False,
        },
        {"type": "object", "properties": {"a": COUNT}, "required": ["a"], "unevaluatedProperties": False},
        arguments(a={"type": "array", "items": COUNT, "contains": {}, "maxItems": 2}),
    ],
    "Anthropic's tools": [
        client_function(MessagesTool(type=kind, enable_zoom=True))[1]  # type: ignore[index]
        for kind in ("text_editor_20250728", "memory_20250818", "computer_20251124")
    ],
}
"""Schemas of which every keyword is enforced."""

NOT_ENFORCED: dict[str, Schema] = {
    ".properties.a.uniqueItems": arguments(a={"type": "array", "items": COUNT, "uniqueItems": True, "maxItems": 3}),
    ".properties.a.contains": arguments(a={"type": "array", "items": COUNT, "contains": {"const": 1}, "maxItems": 3}),
    ".properties.a.not": arguments(a={"type": "string", "not": {"pattern": "x"}, "maxLength": 5}),
    ".propertyNames": {
        "type": "object",
        "propertyNames": {"format": "date"},
        "additionalProperties": COUNT,
        "maxProperties": 1,
    },
    ".if": {**arguments(a=TEXT), "if": {"properties": {"a": {"const": "x"}}}, "then": {"maxProperties": 0}},
    ".properties.a.pattern": arguments(a={"type": "string", "pattern": "^(?!x)[a-z]{3}$"}),
    ".properties.a.oneOf": arguments(
        a={"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "number", "minimum": 5, "maximum": 6}]}
    ),
    ".properties.a.$ref": arguments(a={"$ref": "https://example.com/x"}, b=COUNT),
    ".properties.a.type": arguments(a={"type": "float"}),
    ".properties.a.enum": arguments(a={"enum": [2**60]}),
}
"""Schemas by the path of what of them is not enforced."""

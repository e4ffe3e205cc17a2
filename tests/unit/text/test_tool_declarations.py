"""The TypeScript form of tool declarations, compared with worked examples."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given

from kimi_mlx.text.tool_declarations import ToolDeclarationError, to_typescript
from tests.schemas import ANY_JSON, ANY_OBJECT


def function(name: str, description: str = "", parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters or {}},
    }


FIND_TRAINS = {
    "type": "object",
    "$defs": {
        "Person": {
            "type": "object",
            "description": "Who travels",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name"],
        }
    },
    "required": ["to", "when"],
    "properties": {
        "to": {"type": "string", "description": "Arrival station", "minLength": 3},
        "when": {"type": "string", "description": "ISO date", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "class": {"type": "string", "enum": ["first", "second"], "default": "second"},
        "seats": {"type": "integer", "minimum": 1, "maximum": 6, "default": 1},
        "via": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "passenger": {"$ref": "#/$defs/Person"},
        "budget": {"anyOf": [{"type": "number"}, {"type": "null"}], "description": "Upper price in EUR"},
        "legs": {
            "type": "array",
            "items": {
                "type": "object",
                "description": "one leg",
                "properties": {"line": {"type": "string"}},
                "required": ["line"],
                "additionalProperties": False,
            },
        },
        "extra": {"type": ["string", "integer"]},
    },
}
TREE = {
    "type": "object",
    "properties": {
        "kids": {"type": "array", "items": {"$ref": "#"}},
        "v": {"type": "boolean", "default": False},
    },
}
WORKED_EXAMPLE = r"""# Tools

## functions
namespace functions {
// Who travels
interface Person {
  name: string,
  age?: number
}
// Look up departures.

// Returns at most one page.
type find_trains = (_: {
  // Arrival station
  // minLength: 3
  to: string,
  // ISO date
  // pattern: ^\d{4}-\d{2}-\d{2}$
  when: string,
  // Upper price in EUR
  budget?: number | null,
  // Default: "second"
  class?: "first" | "second",
  extra?: string | number,
  legs?: Array<
    // one leg
    {
      line: string,
      [k: string]: never
    }
  >,
  passenger?: Person,
  // maximum: 6, minimum: 1
  // Default: 1
  seats?: number,
  // maxItems: 3
  via?: Array<string>
}) => any;
type ping = (_: {}) => any;
interface parameters {
  kids?: Array<parameters>,
  // Default: False
  v?: boolean
}
// Recursive
type tree = (_: parameters) => any;
}
"""


def test_worked_example_byte_for_byte():
    tools = [
        function("find_trains", "Look up departures.\n\nReturns at most one page.", FIND_TRAINS),
        function("ping", "", {"type": "object", "properties": {}}),
        function("tree", "Recursive", TREE),
    ]
    assert to_typescript(tools) == WORKED_EXAMPLE


def test_without_tools_the_block_is_empty():
    assert to_typescript([]) == ""
    assert to_typescript([{"type": "_plugin", "function": {"name": "x"}}, {"type": "function"}]) == ""


def declared(schema: Any) -> str:
    """Return the declaration of one optional field `x` of this schema."""
    text = to_typescript([function("f", "", {"type": "object", "properties": {"x": schema}})])
    head, tail = "namespace functions {\ntype f = (_: {\n", "\n}) => any;\n}\n"
    return text.split(head)[1].removesuffix(tail)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (True, "  x?: any"),
        (False, "  x?: null"),
        ({}, "  x?: any"),
        ({"type": "array"}, "  x?: Array<any>"),
        ({"type": ["object", "array", "null"]}, "  x?: {} | Array<any> | null"),
        ({"enum": [1, None, True, "a"]}, '  x?: 1 | None | True | "a"'),
        ({"type": ["string", "null"], "enum": ["a", None]}, '  x?: "a" | None'),
        ({"type": "number", "default": 0.5}, "  // Default: 0.5\n  x?: number"),
        ({"type": "string", "default": "ü"}, '  // Default: "ü"\n  x?: string'),
        ({"type": "object", "additionalProperties": True}, "  x?: {\n    [k: string]: any\n  }"),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            "  x?: {\n    [k: string]: number\n  }",
        ),
        (
            {"type": "array", "items": {"enum": ["a"], "description": "d"}},
            '  x?: Array<\n    // d\n    "a"\n  >',
        ),
        ({"anyOf": [{"type": "string", "maxLength": 2}]}, "  x?: string"),
    ],
)
def test_types(schema: Any, expected: str):
    assert declared(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "string"}]},
        {"allOf": [{"type": "string"}]},
        {"description": "no type"},
        {"type": None},
        {"type": ["string", "file"]},
        {"$ref": "#/$defs/Missing"},
        {"$ref": "https://example.org/schema"},
        {"type": "string", "enum": [1]},
        {"type": ["string", "integer"], "enum": ["a"]},
        {"type": "object", "properties": []},
        {"type": "object", "properties": {"y": "string"}},
        {"type": "string", "description": 7},
        {"type": [["string", "number"]]},
        {"type": [{"type": "string"}]},
        {"type": "integer", "default": 10**5000},
        {"type": "integer", "maximum": 10**5000},
        {"enum": [10**5000]},
    ],
)
def test_a_schema_without_typescript_form_is_an_error(schema: Any):
    with pytest.raises(ToolDeclarationError):
        declared(schema)


@given(parameters=ANY_OBJECT, description=ANY_JSON, name=ANY_JSON)
def test_any_json_has_a_typescript_form_or_is_an_error_of_ours(parameters: Any, description: Any, name: Any):
    tool = {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
    with contextlib.suppress(ToolDeclarationError):
        assert to_typescript([tool]).startswith("# Tools")


def test_endless_nesting_is_an_error_without_a_crash():
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ToolDeclarationError, match="nested deeper"):
        declared(schema)

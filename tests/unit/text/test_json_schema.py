"""Schemas of users: errors with their location, dropped annotations, and kept keywords."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from hypothesis import given

from kimi_mlx.errors import GrammarError
from kimi_mlx.text.json_schema import MAX_DEPTH, check_schema, to_grammar
from tests.schemas import ANY_OBJECT

STRING = {"type": "string"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = STRING
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("words", "`here: $`: not a schema"),
        (False, "nothing satisfies it"),
        ({"minimum": float("nan")}, "not plain JSON"),
        ({"type": "strnig"}, "`here: $.type`: `strnig` is not a type"),
        ({"properties": {"a": {"not": {}}}}, "`here: $.properties.a.not`: this schema feature is not supported"),
        ({"anyOf": [STRING, {"uniqueItems": True}]}, "`here: $.anyOf[1].uniqueItems`"),
        ({"anyOf": []}, "`here: $.anyOf`: not a list of schemas"),
        ({"properties": [STRING]}, "`here: $.properties`: not an object of schemas"),
        ({"items": 3}, "`here: $.items`: not a schema"),
        ({"required": "a"}, "`here: $.required`: not a list of names"),
        ({"enum": []}, "`here: $.enum`: not a list of values"),
        ({"enum": [{"a": 2**53 + 1}]}, "are not exact"),
        ({"minLength": -1}, "`here: $.minLength`: `-1` is not a whole number"),
        ({"maximum": "3"}, "`here: $.maximum`: `3` is not a number"),
        ({"multipleOf": 0}, "`0` is not a number above 0"),
        ({"items": {"pattern": "(a"}}, "`here: $.items`: unclosed group"),
        ({"pattern": "^(?!a)"}, "look-around"),
        ({"$ref": "#"}, "only an infinite value satisfies it"),
        (
            {"properties": {"a": {"$ref": "#"}}, "type": "object", "required": ["a"]},
            "only an infinite value satisfies it",
        ),
        ({"$ref": "#/$defs/a", "$defs": {"b": {}}}, "`here: $.$ref`: no schema `#/$defs/a` in this schema"),
        ({"$ref": "https://example.com/schema"}, "no schema `https://example.com/schema`"),
        ({"$ref": "#/anyOf/²", "anyOf": [{}, {}, {}]}, "no schema `#/anyOf/²`"),
        pytest.param({"$ref": "#/anyOf/" + "5" * 5000, "anyOf": [{}]}, "no schema `#/anyOf/555", id="many digits"),
        ({"properties": {"a": {"oneOf": [{"type": "number"}, {"minimum": 3}]}}}, "`here: $.properties.a`: `oneOf`"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater than maximum (2)"),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "less than 1 from the other bound"),
        ({"minProperties": 3, "required": ["a"]}, "`here: $.minProperties`"),
        ({"$defs": {"a": {"pattern": "("}}, "items": {"$ref": "#/$defs/a"}}, "`here: $.$defs.a`: unclosed group"),
        (nested(MAX_DEPTH + 1), f"deeper than {MAX_DEPTH}"),
        ({"properties": {f"p{i}": {} for i in range(1001)}}, "properties with more than 1000 names"),
        ({"required": [f"p{i}" for i in range(1001)]}, "required with more than 1000 names"),
        ({"const": [{f"p{i}": 0 for i in range(1001)}]}, "properties with more than 1000 names"),
        ({"patternProperties": {f"^{i}$": {} for i in range(33)}}, "patternProperties with more than 32 names"),
        ({"maximum": -(10**400)}, "a number beyond 1.8e+308 is not supported"),
        ({"multipleOf": 10**400}, "a number beyond"),
        ({"default": 10**5000}, "`here` has an integer of more than 1000 digits"),
        ({"const": "x" * 200_000}, "`here` has more than 200000 characters"),
        ({"type": "integer", "multipleOf": 10**9 + 7}, "fuel"),
    ],
)
def test_errors_name_the_location_and_are_found_quickly(schema: Any, message: str) -> None:
    started = time.process_time()
    with pytest.raises(GrammarError) as caught:
        check_schema(schema, "here")
    assert message in str(caught.value)
    assert time.process_time() - started < 5


def test_annotations_are_dropped() -> None:
    schema = {"title": "A", "default": 1, "x-guidance": {"lenient": True}, "format": "int32", "uniqueItems": False}
    assert check_schema({**schema, "properties": {"format": {"format": "date", "$comment": "x"}}}, "here") == {
        "properties": {"format": {"format": "date"}}
    }
    assert check_schema(True, "here") == {}


def test_bounds_move_inwards_to_exact_floats() -> None:
    clean = check_schema({"maximum": 2**63 - 1, "minimum": 2**53 + 1}, "here")
    assert clean == {"maximum": 2**63 - 1024, "minimum": 2**53 + 2}


def test_a_union_as_pydantic_writes_it() -> None:
    def animal(kind: str) -> dict[str, Any]:
        return {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}

    references = [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]
    schema = {"$defs": {"Cat": animal("cat"), "Dog": animal("dog")}, "oneOf": references}
    assert check_schema(schema, "here")["oneOf"][0] == {"type": "object", "$ref": "#/$defs/Cat"}


@given(schema=ANY_OBJECT)
def test_any_json_is_a_schema_or_an_error_of_ours(schema: dict[str, Any]) -> None:
    with contextlib.suppress(GrammarError):
        to_grammar(check_schema(schema, "here"))

"""Bounds on schemas: what exceeds them is refused at once."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kimi_mlx.errors import GrammarError
from kimi_mlx.text.schema_bounds import MAX_CHARS, MAX_DIGITS, MAX_NESTING, MAX_TOOLS, check_bounds, check_value


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("tools", "response_schema"),
    [
        ([], None),
        ([], True),
        ([tool(nested(MAX_NESTING - 3))] * MAX_TOOLS, nested(MAX_NESTING - 1)),
        ([tool({"const": 10**MAX_DIGITS - 1})], {"enum": [1.5, None, -(10**MAX_DIGITS) + 1]}),
        ([tool("x" * (MAX_CHARS - 200))], {"const": "x" * (MAX_CHARS - 200)}),
    ],
)
def test_schemas_within_the_bounds(tools: list[Any], response_schema: Any) -> None:
    check_bounds(tools, response_schema)


@pytest.mark.parametrize(
    ("tools", "response_schema", "message"),
    [
        ([tool({})] * (MAX_TOOLS + 1), None, f"`tools` has {MAX_TOOLS + 1} tools; at most {MAX_TOOLS}"),
        ([tool({}), tool(nested(180))], None, rf"`tools\[1\]` is nested deeper than {MAX_NESTING}"),
        ([], nested(100_000), "`response_format` is nested deeper"),
        (
            [tool({"anyOf": [{"const": i} for i in range(100_000)]})],
            None,
            r"`tools\[0\]` has more than 200000 characters",
        ),
        ([tool({"x" * 100_000: "y" * 100_000})], None, r"`tools\[0\]` has more than 200000 characters"),
        ([tool({"const": "x" * 190_000})] * 12, None, "`tools` have more than 2000000 characters together"),
        ([tool({"maximum": 10**5000})], None, r"`tools\[0\]` has an integer of more than 1000 digits"),
        ([], {"enum": [-(10**5000)]}, "`response_format` has an integer of more than 1000 digits"),
    ],
)
def test_a_schema_beyond_a_bound_is_refused_quickly(tools: list[Any], response_schema: Any, message: str) -> None:
    started = time.process_time()
    with pytest.raises(GrammarError, match=message):
        check_bounds(tools, response_schema)
    assert time.process_time() - started < 1


def test_the_number_of_characters_is_about_that_of_json() -> None:
    assert check_value({"a": [1, "bc", None, True]}, "x") == pytest.approx(len('{"a":[1,"bc",null,true]}'), abs=8)

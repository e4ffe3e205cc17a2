"""Names and schemas of tools."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.text.schema_bounds import MAX_TOOLS
from kimi_mlx.tools.declarations import MAX_NAME, ServerTool, assign_names, changes, declare, without_titles

OBJECT = {"type": "object", "properties": {"x": {"type": "string"}}}


def test_names_of_several_servers() -> None:
    tools = [ServerTool("a", "search"), ServerTool("b", "search"), ServerTool("b", "read.file"), ServerTool("c", "好")]
    assert assign_names(tools) == ["a__search", "b__search", "read_file", "tool"]


@given(st.lists(st.tuples(st.text(max_size=90), st.text(max_size=90)), max_size=20))
def test_names_are_valid_and_differ(pairs: list[tuple[str, str]]) -> None:
    names = assign_names([ServerTool(server, name) for server, name in pairs])
    assert len(set(names)) == len(pairs)
    assert all(re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_NAME}}}", name) for name in names)


def test_what_a_grammar_cannot_enforce_is_noted() -> None:
    tools = [ServerTool("a", "good", schema=OBJECT), ServerTool("a", "other", schema={**OBJECT, "not": {}})]
    declared, notes = declare(tools)
    assert [tool.note for tool in declared] == ["", "`$.not`: this schema feature is not supported"]
    assert notes == []
    assert declare([ServerTool("a", "x", schema={"type": "string"})])[0][0].note
    assert not declare([ServerTool("a", "x", schema={})])[0][0].note


def test_tools_that_are_too_large_or_too_many_are_left_out() -> None:
    large = ServerTool("a", "large", schema={"type": "object", "description": "x" * 300_000})
    declared, notes = declare([large, ServerTool("a", "small", schema=OBJECT)])
    assert [tool.name for tool in declared] == ["small"]
    assert "tool `large` is left out" in notes[0]
    declared, notes = declare([ServerTool("a", f"t{i}", schema=OBJECT) for i in range(MAX_TOOLS + 5)])
    assert len(declared) == MAX_TOOLS
    assert f"tool `t{MAX_TOOLS}` and those after it" in notes[0]


def test_titles_are_dropped_but_not_properties_of_that_name() -> None:
    schema = {
        "$schema": "x",
        "title": "Arguments",
        "properties": {"title": {"title": "Title", "type": "string"}, "xs": {"items": {"title": "X"}}},
        "anyOf": [{"title": "A"}],
        "default": {"title": "kept"},
    }
    assert without_titles(schema) == {
        "properties": {"title": {"type": "string"}, "xs": {"items": {}}},
        "anyOf": [{}],
        "default": {"title": "kept"},
    }


def test_changes() -> None:
    before = [ServerTool("a", "x"), ServerTool("a", "y"), ServerTool("a", "z")]
    after = [ServerTool("a", "x"), ServerTool("a", "y", "other"), ServerTool("a", "new")]
    assert changes(before, after) == "+new -z ~y"
    assert changes(before, before) == ""

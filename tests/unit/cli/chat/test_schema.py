"""The option `--schema`: files, JSON, and lists of fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.cli.chat.schema import read_schema
from kimi_mlx.errors import GrammarError, UsageError


def fields(**types: str) -> dict[str, object]:
    properties = {name: {"type": type_name} for name, type_name in types.items()}
    return {"type": "object", "properties": properties, "required": [*types], "additionalProperties": False}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name", fields(name="string")),
        (
            "name, age int, height float,good bool",
            fields(name="string", age="integer", height="number", good="boolean"),
        ),
        ("name str\nage int\n", fields(name="string", age="integer")),
        (' {"type": "integer"}', {"type": "integer"}),
    ],
)
def test_a_schema_on_the_command_line(text: str, expected: object) -> None:
    assert read_schema(text) == expected


def test_descriptions_of_fields() -> None:
    schema = read_schema("name: full name, if known\nage int: in years")
    assert schema["properties"] == {
        "name": {"type": "string", "description": "full name, if known"},
        "age": {"type": "integer", "description": "in years"},
    }


@pytest.mark.parametrize("name", ["schema.json", "schema"])
def test_a_schema_in_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('\ufeff{"type": "boolean"}')
    assert read_schema(str(path)) == {"type": "boolean"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`--schema` is empty"),
        ("name, 2", "`--schema`: `2` is not a file, JSON or a field"),
        ("age number", "unknown type `number`"),
        ("missing.json", "there is no file `missing.json`"),
        ("/", "`/` is a folder"),
        ('{"a": ', "`--schema` is not JSON: "),
        ('["a"]', "a schema is an object"),
        ("{" * 100_000, "`--schema` is not JSON"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_no_schema(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_schema(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"type": "object", "properties": {"a": {"not": {}}}}', "`--schema: $.properties.a"),
        ('{"type": "text"}', "`--schema: $"),
    ],
)
def test_a_schema_that_cannot_be_enforced_names_the_place(text: str, place: str) -> None:
    with pytest.raises(GrammarError) as caught:
        read_schema(text)
    assert caught.value.message.startswith(place)

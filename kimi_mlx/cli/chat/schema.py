"""The option `--schema`: a JSON schema from a file or from the command line, or a list of fields."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeAlias, cast

from kimi_mlx.errors import UsageError

SCHEMA_NAME = "--schema"
"""Name of the schema in error messages."""

JSON_START = re.compile(r"\s*[\[{\"]")
FILE_LIKE = re.compile(r"[/\\]|\.json[5c]?$", re.IGNORECASE)
FIELD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:\s+([a-z]+))?(?:\s*:\s*(.+))?")
"""A field of a list: its name, its type, and its description."""

FIELD_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
FIELDS_HINT = "write a file name, a JSON schema, or fields such as `name, age int, bio: one sentence`"

Schema: TypeAlias = "dict[str, Any]"


def read_schema(argument: str) -> Schema:
    """Return the schema that `--schema` means, checked as the server checks it.

    Args:
        argument: name of a file, a schema as JSON, or a list of fields in the format of the tool `llm`.

    Raises:
        UsageError: the file cannot be read, or it is no list of fields.
        GrammarError: it is no valid schema, or a part of it cannot be enforced; the message has the location.
    """
    from kimi_mlx.text.json_schema import check_schema  # llguidance: not for `--help`

    schema = _parse(argument)
    check_schema(schema, SCHEMA_NAME)
    return schema


def _parse(argument: str) -> Schema:
    from kimi_mlx.cli.chat.files.text_files import read_text_file  # Rich: not for `--help`

    path = Path(argument).expanduser()
    if JSON_START.match(argument):
        return _parse_json(argument, f"`{SCHEMA_NAME}`")
    if FILE_LIKE.search(argument) or (len(argument) < 200 and path.is_file()):
        return _parse_json(read_text_file(path).text, f"`{path}`")
    return parse_fields(argument)


def _parse_json(text: str, place: str) -> Schema:
    """Parse a schema.

    Raises:
        UsageError: it is not JSON, or no object.
    """
    try:
        schema = json.loads(text)
    except RecursionError:
        raise UsageError(f"{place} is nested too deeply", hint="simplify the schema") from None
    except ValueError as error:
        raise UsageError(f"{place} is not JSON: {error}", hint=FIELDS_HINT) from None
    if not isinstance(schema, dict):
        raise UsageError(f"{place} is JSON, but no schema: a schema is an object", hint=FIELDS_HINT)
    return cast("Schema", schema)


def parse_fields(text: str) -> Schema:
    """Return the schema of an object with a list of fields, all required.

    Args:
        text: fields with a comma or a line break between them: `NAME [TYPE] [: DESCRIPTION]`. The types are
            str (the default), int, float and bool. With line breaks, descriptions may have commas.

    Raises:
        UsageError: a field has another form.
    Source: `llm schemas dsl`, https://llm.datasette.io/en/stable/schemas.html
    """
    properties: Schema = {}
    for part in text.strip().split("\n" if "\n" in text.strip() else ","):
        if not part.strip():
            continue
        match = FIELD.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"`{SCHEMA_NAME}`: `{part.strip()}` is not a file, JSON or a field", hint=FIELDS_HINT)
        name, type_name, description = match.groups()
        if (type_name or "str") not in FIELD_TYPES:
            hint = f"use {', '.join(f'`{known}`' for known in FIELD_TYPES)}, or a JSON schema"
            raise UsageError(f"`{SCHEMA_NAME}`: the field `{name}` has the unknown type `{type_name}`", hint=hint)
        properties[name] = {"type": FIELD_TYPES[type_name or "str"]}
        if description:
            properties[name]["description"] = description.strip()
    if not properties:
        raise UsageError(f"`{SCHEMA_NAME}` is empty", hint=FIELDS_HINT)
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}

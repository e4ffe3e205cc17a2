"""Grammars for the arguments of tools.

A tool is never refused for its schema. What cannot be enforced is dropped from the grammar, and noted; the grammar then
accepts more than the schema, never less. If that is not enough, the arguments are any JSON object.

Models choose the order of optional arguments themselves, so these may come in any order, after the required ones.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import Any, cast

from kimi_mlx.text.digest_cache import DigestCache
from kimi_mlx.text.json_schema import (
    ANY_OBJECT,
    DEPENDENT,
    SCHEMA_LISTS,
    SCHEMA_TABLES,
    SINGLE_SCHEMAS,
    Schema,
    clean_schema,
    compile_s,
    find_problem,
    locate,
    to_grammar,
)

ANY_ARGUMENTS = to_grammar(ANY_OBJECT)
"""Grammar of any JSON object."""

NO_ARGUMENTS = to_grammar({**ANY_OBJECT, "additionalProperties": False})
"""Grammar of the arguments of a tool without arguments."""

MAX_COMPILE_S = 0.25
"""Maximum CPU time to compile a grammar, because other answers may have to wait for it."""

MAX_RELAX_S = 0.5
"""Maximum CPU time for dropping keywords to make a schema acceptable."""

MAX_ANY_ORDER = 16
"""Maximum number of optional properties of an object that may come in any order; each is compiled as a pattern."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9_.$ -]+")
"""Names of properties that can be written as patterns."""

MAX_CACHED = 2048
"""Maximum number of cached grammars: agents send the same tools with every request."""

SUSPECTS = (
    *("pattern", "format", "multipleOf", "minLength", "maxLength", "exclusiveMinimum", "exclusiveMaximum", "minimum"),
    *("maximum", "minItems", "maxItems", "minProperties", "maxProperties", "patternProperties", "allOf", "prefixItems"),
    *("anyOf", "enum", "const", "required", "items", "properties"),
)
"""Keywords that may be dropped from a subschema that is refused, in this order."""

Problem = tuple[str, str]
"""Path of a keyword that is not enforced, such as `.properties.age.not`, and the reason."""


def arguments_grammar(parameters: Any) -> tuple[str, Sequence[Problem]]:
    """Return the grammar of a tool's arguments, and the keywords of the schema that it does not enforce.

    This takes a second at most, for malicious schemas. Results are cached.

    Args:
        parameters: JSON schema of the arguments, whose size has been checked; None for a tool without arguments.
    """
    if parameters is None:
        return NO_ARGUMENTS, ()
    text = _to_json(parameters)
    return (ANY_ARGUMENTS, [("", "it is not plain JSON")]) if text is None else _cached_grammars(text)


def is_cached(parameters: Any) -> bool:
    """Return whether the grammar of these arguments is cached."""
    text = None if parameters is None else _to_json(parameters)
    return text is None or text in _cached_grammars


def _to_json(parameters: Any) -> str | None:
    try:
        return json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError):
        return None


def _compute(text: str) -> tuple[str, Sequence[Problem]]:
    problems: list[Problem] = []
    schema = _as_object(json.loads(text), problems)
    began = time.thread_time()
    clean = clean_schema(schema, lambda path, problem: problems.append((path[1:], problem)))
    grammar = _grammar_in_time(clean, text)
    while grammar is None and (problem := find_problem(to_grammar(clean))) is not None:
        if time.thread_time() - began > MAX_RELAX_S:
            return ANY_ARGUMENTS, [("", problem)]
        path, part = locate(clean, problem)
        problems.append((f"{path[1:]}{_drop_suspect(part, clean)}", problem))
    grammar = grammar or _grammar_in_time(clean, text)
    if grammar is None:
        return ANY_ARGUMENTS, [("", "it is too complex to enforce in time")]
    return grammar, tuple(problems)


def _grammar_in_time(schema: Schema, text: str) -> str | None:
    """Return the grammar of a schema, if possible for properties in any order; None if it compiles too slowly or not.

    Args:
        schema: schema.
        text: its original; a reference in it may point into `properties`, which must then stay in place.
    """
    in_any_order = [] if "/properties/" in text else [_in_any_order(schema)]
    for candidate in map(to_grammar, [*in_any_order, schema]):
        if find_problem(candidate) is None and compile_s(candidate) <= MAX_COMPILE_S:
            return candidate
    return None


_cached_grammars = DigestCache(_compute, MAX_CACHED)


def _as_object(schema: Any, problems: list[Problem]) -> Schema:
    """Return the schema with the type that arguments always have, `object`."""
    if schema is True:
        return ANY_OBJECT
    if not isinstance(schema, dict):
        problems.append(("", "it is not the schema of an object"))
        return ANY_OBJECT
    table = cast("Schema", schema)
    kind = table.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        problems.append((".type", "arguments are an object"))
    return {**table, "type": "object"}


def _drop_suspect(part: Schema, root: Schema) -> str:
    """Drop the keyword that makes a subschema unacceptable; return it after a dot, or "" if all were dropped."""
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    if "oneOf" in part and "anyOf" not in part:
        relaxed = {**part, "anyOf": part["oneOf"]}
        del relaxed["oneOf"]
        if find_problem(to_grammar({**relaxed, **definitions})) is None:
            _replace(part, relaxed)
            return ".oneOf"
    for keyword in SUSPECTS:
        dropped = {keyword, *DEPENDENT.get(keyword, ())}
        relaxed = {key: value for key, value in part.items() if key not in dropped}
        if keyword in part and find_problem(to_grammar({**relaxed, **definitions})) is None:
            _replace(part, relaxed)
            return f".{keyword}"
    _replace(part, ANY_OBJECT if part is root else {})
    return ""


def _replace(part: Schema, schema: Schema) -> None:
    part.clear()
    part.update(schema)


def _in_any_order(schema: Any) -> Any:
    """Return an equivalent schema with optional properties as patterns, which llguidance accepts in any order."""
    if not isinstance(schema, dict):
        return schema
    table = cast("Schema", schema)
    result: Schema = {}
    for keyword, value in table.items():
        if keyword in SCHEMA_TABLES:
            result[keyword] = {name: _in_any_order(part) for name, part in value.items()}
        elif isinstance(value, list) and keyword in (*SCHEMA_LISTS, "items"):
            result[keyword] = [_in_any_order(part) for part in cast("list[Any]", value)]
        else:
            result[keyword] = _in_any_order(value) if keyword in SINGLE_SCHEMAS else value
    properties = result.get("properties", {})
    optional = [name for name in properties if name not in table.get("required", ())]
    if (
        2 <= len(optional) <= MAX_ANY_ORDER
        and not table.keys() & {"patternProperties", "minProperties", "maxProperties"}
        and all(PLAIN_NAME.fullmatch(name) for name in optional)
    ):
        result["properties"] = {name: part for name, part in properties.items() if name not in optional}
        result["patternProperties"] = {f"^{re.escape(name)}$": properties[name] for name in optional}
    return result

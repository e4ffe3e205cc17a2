"""Find endless subschemas, which only infinite values satisfy, such as an object that requires itself.

A model that begins such a value can never end it. So endless subschemas are replaced by `false`; the schema then allows
the same finite values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

Schema = dict[str, Any]
Resolve = Callable[[str], Any]

SCALARS = frozenset({"null", "boolean", "integer", "number", "string"})


def find_endless(parts: list[Schema], resolve: Resolve) -> set[int]:
    """Return the ids, as by id(), of the subschemas that no finite value satisfies.

    Args:
        parts: all subschemas of a checked schema, innermost first.
        resolve: function that returns the target of a `$ref`, or None.
    """
    finite: set[int] = set()
    has_changed = True
    while has_changed:
        has_changed = False
        for part in parts:
            if id(part) not in finite and _is_finite(part, finite, resolve):
                finite.add(id(part))
                has_changed = True
    return {id(part) for part in parts} - finite


def drop_endless(parts: list[Schema], endless: set[int]) -> None:
    """Replace endless subschemas in the others.

    Args:
        parts: all subschemas of a checked schema; they are changed.
        endless: ids of those that no finite value satisfies.
    """

    def replaced(value: Any) -> Any:
        return False if id(value) in endless else value

    for part in parts:
        for keyword, value in part.items():
            if keyword in ("properties", "patternProperties"):
                part[keyword] = {name: replaced(schema) for name, schema in value.items()}
            elif keyword in ("anyOf", "oneOf"):
                part[keyword] = [schema for schema in value if id(schema) not in endless] or value
            elif keyword in ("items", "additionalItems", "additionalProperties"):
                part[keyword] = replaced(value)


def _is_finite(part: Schema, finite: set[int], resolve: Resolve) -> bool:
    """Return whether a finite value satisfies a schema, given the subschemas that are known to have one."""

    def has_value(schema: Any) -> bool:
        return schema is not False and (schema is True or id(schema) in finite)

    if "$ref" in part and not has_value(resolve(part["$ref"])):
        return False
    if not all(map(has_value, part.get("allOf", ()))):
        return False
    if any(not any(map(has_value, part[keyword])) for keyword in ("anyOf", "oneOf") if keyword in part):
        return False
    kinds = part.get("type", "null")
    if "enum" in part or "const" in part or SCALARS & {*([kinds] if isinstance(kinds, str) else kinds)}:
        return True
    return ("object" in kinds and _has_object(part, has_value)) or ("array" in kinds and _has_list(part, has_value))


def _has_object(part: Mapping[str, Any], has_value: Callable[[Any], bool]) -> bool:
    properties, others = part.get("properties", {}), part.get("additionalProperties", True)
    is_open = "patternProperties" in part
    return all(has_value(properties.get(name, True if is_open else others)) for name in part.get("required", ()))


def _has_list(part: Mapping[str, Any], has_value: Callable[[Any], bool]) -> bool:
    items = part.get("items", True)
    first = part.get("prefixItems", items if isinstance(items, list) else [])
    rest = part.get("additionalItems", True) if isinstance(items, list) else items
    needed = min(part.get("minItems", 0), len(cast("list[Any]", first)) + 1)
    return all(has_value(schema) for schema in [*first, rest][:needed])

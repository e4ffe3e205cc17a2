"""Replace keywords of JSON Schema that llguidance does not support by equivalent ones, where possible.

Each rule takes a schema whose other keywords it may change, and removes its own keyword only if the result has the same
instances; otherwise the keyword stays. The schemas are those of users: any keyword may have any value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any, cast

Schema = dict[str, Any]

MAX_UNIQUE_VALUES = 5
"""Maximum number of values of the items of a list without duplicates: all such lists are enumerated, 326 of 5."""

MAX_DEPENDENCIES = 3
"""Maximum number of properties that others depend on: the number of cases doubles with each."""

COMBINATIONS = ("allOf", "anyOf", "oneOf", "if", "then", "else", "$ref", "dependentSchemas")
"""Keywords that evaluate properties and items in other schemas."""

ANY_TYPES = ("null", "boolean", "number", "string", "array", "object")


def rewrite(schema: Mapping[str, Any]) -> Schema:
    """Return an equivalent schema with fewer unsupported keywords. Subschemas are not changed."""
    copy = dict(schema)
    for keyword, rule in RULES.items():
        if keyword in copy:
            rule(copy)
    return copy


def _table(value: Any) -> Schema | None:
    return cast("Schema", value) if isinstance(value, dict) else None


def _names(value: Any) -> list[str]:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return items if all(isinstance(item, str) for item in items) else []


def _add(schema: Schema, *conditions: Schema) -> None:
    """Add schemas that instances must satisfy, too."""
    both = schema.get("allOf", [])
    schema["allOf"] = [*(cast("list[Any]", both) if isinstance(both, list) else []), *conditions]


def _without(name: str) -> Schema:
    """Return the schema of objects without a property."""
    return {"type": "object", "properties": {name: False}}


def _equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal in JSON, where true is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _values(schema: Any) -> list[Any] | None:
    """Return all values that a schema allows, if it lists them."""
    table = _table(schema)
    if table is None:
        return None
    if "const" in table:
        return [table["const"]]
    if isinstance(table.get("enum"), list):
        return table["enum"]
    return {"boolean": [True, False], "null": [None]}.get(str(table.get("type")))


def _single_type(schema: Schema) -> None:
    kinds = schema["type"]
    if isinstance(kinds, list) and len(cast("list[Any]", kinds)) == 1:
        schema["type"] = kinds[0]


def _boolean_bound(exclusive: str, inclusive: str) -> Callable[[Schema], None]:
    """Return a rule for exclusive bounds as booleans, the form of draft 4."""

    def rule(schema: Schema) -> None:
        if schema[exclusive] is True and inclusive in schema:
            schema[exclusive] = schema.pop(inclusive)
        elif isinstance(schema[exclusive], bool):
            del schema[exclusive]

    return rule


def _dependencies(schema: Schema) -> None:
    """Split the older keyword into its two successors."""
    table = _table(schema["dependencies"])
    if table is None or "dependentRequired" in schema or "dependentSchemas" in schema:
        return
    del schema["dependencies"]
    schema["dependentRequired"] = {name: value for name, value in table.items() if isinstance(value, list)}
    schema["dependentSchemas"] = {name: value for name, value in table.items() if not isinstance(value, list)}


def _dependent_required(schema: Schema) -> None:
    table = _table(schema["dependentRequired"])
    if table is not None and all(_names(value) == value for value in table.values()):
        schemas = {name: {"type": "object", "required": [name, *names]} for name, names in table.items() if names}
        if _add_dependencies(schema, schemas):
            del schema["dependentRequired"]


def _dependent_schemas(schema: Schema) -> None:
    table = _table(schema["dependentSchemas"])
    if table is not None:
        schemas = {name: {"allOf": [{"type": "object", "required": [name]}, value]} for name, value in table.items()}
        if _add_dependencies(schema, schemas):
            del schema["dependentSchemas"]


def _add_dependencies(schema: Schema, schemas: Schema) -> bool:
    """Require a schema for each property that is present; return False if there are too many cases."""
    if len(schemas) > MAX_DEPENDENCIES or (schemas and schema.get("type") != "object"):
        return False
    required = _names(schema.get("required"))
    _add(
        schema, *(value if name in required else {"anyOf": [_without(name), value]} for name, value in schemas.items())
    )
    return True


def _property_names(schema: Schema) -> None:
    names = schema["propertyNames"]
    table = {} if names is True else _table(names)
    if table is None or "patternProperties" in schema:
        return
    table = {key: value for key, value in table.items() if (key, value) != ("type", "string")}
    others = schema.get("additionalProperties", True)
    properties = _table(schema.get("properties", {}))
    if not table:
        del schema["propertyNames"]
    elif properties is None:
        return
    elif table.keys() == {"enum"} and (allowed := _names(table["enum"])):
        named = {name: properties.get(name, others) for name in allowed}
        schema["properties"] = {**{name: False for name in properties if name not in allowed}, **named}
        schema["additionalProperties"] = False
        del schema["propertyNames"]
    elif (pattern := _name_pattern(table)) is not None and others is not False and (others is True or not properties):
        if not all(_matches(pattern, name) for name in properties):
            return
        schema |= {"patternProperties": {pattern: others}, "additionalProperties": False}
        del schema["propertyNames"]


def _name_pattern(names: Schema) -> str | None:
    """Return the pattern of the names that a schema with one condition allows."""
    if names.keys() == {"pattern"} and isinstance(names["pattern"], str):
        return names["pattern"]
    if names.keys() <= {"minLength", "maxLength"} and all(isinstance(value, int) for value in names.values()):
        return rf"^[\s\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    return None


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _not(schema: Schema) -> None:
    conditions = _negations(schema, schema["not"])
    if conditions is not None:
        del schema["not"]
        if conditions:
            _add(schema, *conditions)


def _negations(schema: Schema, negated: Any) -> list[Schema] | None:
    """Return schemas that, together with `schema`, express the negation of `negated`; None if there are none."""
    table = _table(negated)
    if table is None or len(table) != 1:
        return None
    ((keyword, value),) = table.items()
    if keyword == "anyOf" and isinstance(value, list):
        found = [_negations(schema, part) for part in cast("list[Any]", value)]
        known = [conditions for conditions in found if conditions is not None]
        return [condition for conditions in known for condition in conditions] if len(known) == len(found) else None
    if keyword == "required" and schema.get("type") == "object" and _names(value):
        return [{"anyOf": [_without(name) for name in value]} if len(value) > 1 else _without(value[0])]
    if keyword in ("const", "enum"):
        allowed, excluded = _values(schema), _values(table)
        if allowed is None or excluded is None:
            return None
        return [{"enum": [item for item in allowed if not any(_equal(item, other) for other in excluded)]}]
    if keyword == "type":
        excluded_types = {value} if isinstance(value, str) else {*_names(value)}
        own = schema.get("type", [*ANY_TYPES])
        own_types = [own] if isinstance(own, str) else _names(own)
        if not excluded_types or ("integer" in excluded_types and "number" in {*own_types} - excluded_types):
            return None
        also = {"integer"} if "number" in excluded_types else set[str]()
        return [{"type": [kind for kind in own_types if kind not in excluded_types | also]}]
    return None


def _if(schema: Schema) -> None:
    """Replace `if` by its two cases, if it tests one property that lists its values."""
    consequence, alternative = schema.get("then", True), schema.get("else", True)
    condition = _table(schema["if"])
    if consequence is True and alternative is True:
        return _remove_if(schema)
    tested = _table(condition.get("properties")) if condition else None
    if (
        condition is None
        or tested is None
        or len(tested) != 1
        or not condition.keys() <= {"properties", "required", "type"}
    ):
        return None
    ((name, test),) = tested.items()
    own = _values((_table(schema.get("properties")) or {}).get(name))
    wanted = _values(test)
    is_required = name in _names(schema.get("required"))
    needs_property = _names(condition.get("required")) == [name]
    if schema.get("type") != "object" or own is None or wanted is None or not (is_required or needs_property):
        return None
    holds = [value for value in own if any(_equal(value, other) for other in wanted)]
    fails = [value for value in own if not any(_equal(value, other) for other in wanted)]
    cases = [
        {"allOf": [{"type": "object", "properties": {name: {"enum": values}}, "required": required}, rest]}
        for values, required, rest in ((holds, [name], consequence), (fails, [name], alternative))
        if values
    ]
    if not is_required:
        cases.append({"allOf": [_without(name), alternative]})
    _remove_if(schema)
    _add(schema, {"anyOf": cases})
    return None


def _remove_if(schema: Schema) -> None:
    for keyword in ("if", "then", "else"):
        schema.pop(keyword, None)


def _without_if(schema: Schema) -> None:
    """Remove `then` and `else`, which mean nothing without `if`."""
    if "if" not in schema:
        _remove_if(schema)


def _contains(schema: Schema) -> None:
    least = schema.get("minContains", 1)
    if "maxContains" in schema or not isinstance(least, int):
        return
    if least == 0 or (schema["contains"] in (True, {}) and isinstance(schema.get("minItems", 0), int)):
        schema["minItems"] = max(schema.get("minItems", 0), least)
        del schema["contains"]
        schema.pop("minContains", None)


def _contains_bound(schema: Schema) -> None:
    """Remove bounds of `contains`, which mean nothing without it."""
    if "contains" not in schema:
        schema.pop("minContains", None)
        schema.pop("maxContains", None)


def _unique_items(schema: Schema) -> None:
    values = _values(schema.get("items"))
    low, high = schema.get("minItems", 0), schema.get("maxItems", MAX_UNIQUE_VALUES)
    if high in (0, 1):
        del schema["uniqueItems"]
    elif (
        schema["uniqueItems"] is True
        and schema.get("type") == "array"
        and not schema.keys() & {"prefixItems", "enum", "const"}
        and values is not None
        and len(values) <= MAX_UNIQUE_VALUES
        and isinstance(low, int)
        and isinstance(high, int)
    ):
        lists = [list(items) for size in range(low, min(high, len(values)) + 1) for items in permutations(values, size)]
        for keyword in ("uniqueItems", "items", "minItems", "maxItems"):
            schema.pop(keyword, None)
        schema["enum"] = lists


def _unevaluated(keyword: str, own: str) -> Callable[[Schema], None]:
    """Return a rule that replaces an `unevaluated...` keyword in a schema without applied subschemas."""

    def rule(schema: Schema) -> None:
        if not any(other in schema for other in COMBINATIONS):
            schema.setdefault(own, schema.pop(keyword))

    return rule


def _recursive_reference(schema: Schema) -> None:
    if schema["$recursiveRef"] == "#" and "$ref" not in schema:
        schema["$ref"] = schema.pop("$recursiveRef")


RULES: Mapping[str, Callable[[Schema], None]] = {
    "type": _single_type,
    "exclusiveMinimum": _boolean_bound("exclusiveMinimum", "minimum"),
    "exclusiveMaximum": _boolean_bound("exclusiveMaximum", "maximum"),
    "$recursiveRef": _recursive_reference,
    "unevaluatedProperties": _unevaluated("unevaluatedProperties", "additionalProperties"),
    "unevaluatedItems": _unevaluated("unevaluatedItems", "items"),
    "uniqueItems": _unique_items,
    "contains": _contains,
    "minContains": _contains_bound,
    "maxContains": _contains_bound,
    "propertyNames": _property_names,
    "dependencies": _dependencies,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "not": _not,
    "if": _if,
    "then": _without_if,
    "else": _without_if,
}
"""Rules by their keywords, in the order in which they are applied."""

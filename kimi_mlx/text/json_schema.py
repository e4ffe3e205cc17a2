"""JSON schemas from outside: checked, and brought to what llguidance makes grammars of.

What an answer cannot be held to is refused with its place, a JSON path such as `$.properties.age.not`; only notes
(titles, defaults, unknown keywords and formats) are left out without a word, as JSON Schema says.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any, cast

import llguidance

from kimi_mlx.errors import GrammarError

Schema = dict[str, Any]

MAX_CHARS = 200_000
"""Of a schema as JSON."""
MAX_DEPTH = 32
"""Schemas inside schemas."""
MOST = {"patternProperties": 32, "required": 1_000, "properties": 1_000}
"""Names in all of a schema: compiling an object takes time with their square. Other names count as properties."""
MAX_EXACT = 2**53
"""Whole numbers up to here are the same as floats, which is what llguidance calculates in."""
MAX_BOUND = 2**63 - 1024
"""The largest float in 64 bits; bounds beyond it are moved to it."""
LOCATE_S = 1.0
"""So long the schemas inside a schema are tried to find the one that is wrong."""

WHITESPACE = r"[ \t]{1,4}|\r?\n[ \t]{0,64}"
"""Between the parts of JSON: as much as models write. Without a limit a confused one writes nothing else."""

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
LOWER_BOUNDS, UPPER_BOUNDS = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
ONE, LISTS = ("items", "additionalItems", "additionalProperties"), ("prefixItems", "anyOf", "oneOf", "allOf")
TABLES = ("properties", "patternProperties", "$defs", "definitions")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Those that answers keep to; other formats are notes."""
UNSUPPORTED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames", "dependencies"),
    *("dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef"),
)
HINT = "docs/structured-output.md lists what is supported"


def check_schema(schema: Any, where: str) -> Schema:
    """Return the part of a schema that answers can be held to, all of what it asks for.

    Args:
        schema: a JSON schema, of draft 6 or later.
        where: what it is, for messages.

    Raises:
        GrammarError: it is no schema, asks for something unsupported, is too big, or nothing satisfies it.
    """
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"`{where}` is not plain JSON: {error}") from error
    if size > MAX_CHARS:
        raise GrammarError(f"`{where}` has {size} characters, at most {MAX_CHARS} are taken")
    if schema is False:
        raise GrammarError(f"`{where}` is `false`: nothing satisfies it")
    clean = _Cleaner(where).clean(schema, "$", 0)
    for path, part in _parts(clean, "$"):
        _check_reference(part, clean, f"{where}: {path}")
    problem = find_problem(f"start: {to_lark(clean)}")
    if problem:
        raise GrammarError(f"`{where}: {_locate(clean, problem)}`: {problem}", hint=HINT)
    return clean


def to_lark(schema: Schema) -> str:
    """Return a checked schema as the body of a rule in llguidance's dialect of Lark."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})


@lru_cache(maxsize=128)
def find_problem(grammar: str) -> str | None:
    """Return why llguidance refuses a grammar, or that nothing satisfies it; None if all is well.

    At worst, with the limits of llguidance and of this module, it takes about a second.
    """
    matcher = llguidance.LLMatcher(_bytes(), grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
        return "nothing satisfies it" if matcher.is_error() else None
    return _reason(matcher.get_error())


@cache
def _bytes() -> llguidance.LLTokenizer:
    """A tokenizer whose tokens are the bytes."""
    return llguidance.LLTokenizer("byte")


def _reason(error: str) -> str:
    """The sentence in an error of llguidance that says what is wrong."""
    if "oneOf constraints are not supported" in error:
        return "`oneOf` with alternatives that one value may satisfy both of; use `anyOf`"
    lines = error.splitlines()
    said = next((line for line in lines if line.startswith("error: ")), lines[0])
    return said.removeprefix("error: ").rpartition("JSON schema: ")[2].strip()


class _Cleaner:
    """Copies a schema, keyword by keyword.

    Args:
        where: what the schema is, for messages.
    """

    def __init__(self, where: str):
        self._where = where
        self._counts: Counter[str] = Counter()

    def clean(self, schema: Any, path: str, depth: int) -> Schema:
        """Copy what matters of a schema, and of the schemas in it."""
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise self._wrong(path, "not a schema: neither an object nor true or false")
        if depth > MAX_DEPTH:
            raise self._wrong(path, f"schemas are nested deeper than {MAX_DEPTH}")
        clean: Schema = {}
        for keyword, value in cast("Schema", schema).items():
            at = f"{path}.{keyword}"
            if keyword in TABLES:
                clean[keyword] = self._table(keyword, value, at, depth)
            elif keyword in LISTS or (keyword == "items" and isinstance(value, list)):
                clean[keyword] = self._list(keyword, value, at, depth)
            elif keyword in ONE:
                clean[keyword] = self._one(value, at, depth)
            elif keyword in UNSUPPORTED or (keyword == "uniqueItems" and value is not False):
                raise self._wrong(at, "answers cannot be held to this")
            elif keyword in CHECKS:
                problem = CHECKS[keyword](value)
                if problem:
                    raise self._wrong(at, problem)
                self._count(keyword, len(cast("Any", value)) if keyword == "required" else _num_keys(value), at)
                clean[keyword] = value
        if clean.get("minProperties", 0) - len(set(clean.get("required", ()))) > 1:
            raise self._wrong(
                f"{path}.minProperties", "answers are held to one more property than `required`, not to more"
            )
        if _has_open_end(clean):
            raise self._wrong(path, "numbers cannot be kept off a whole one that is less than 1 from the other end")
        return _exact(clean)

    def _one(self, value: Any, at: str, depth: int) -> Schema | bool:
        return False if value is False else self.clean(value, at, depth + 1)

    def _list(self, keyword: str, value: Any, at: str, depth: int) -> list[Schema | bool]:
        if not isinstance(value, list) or (not value and keyword in ("anyOf", "oneOf", "allOf")):
            raise self._wrong(at, "not a list of schemas")
        return [self._one(each, f"{at}[{i}]", depth) for i, each in enumerate(cast("list[Any]", value))]

    def _table(self, keyword: str, value: Any, at: str, depth: int) -> dict[str, Schema | bool]:
        if not isinstance(value, dict):
            raise self._wrong(at, "not an object of schemas")
        table = cast("Schema", value)
        self._count(keyword, len(table), at)
        return {name: self._one(each, f"{at}.{name}", depth) for name, each in table.items()}

    def _count(self, keyword: str, names: int, at: str) -> None:
        kind = keyword if keyword in MOST else "properties"
        self._counts[kind] += names
        if self._counts[kind] > MOST[kind]:
            raise self._wrong(at, f"{kind} with more than {MOST[kind]} names in all of the schema")

    def _wrong(self, path: str, problem: str) -> GrammarError:
        return GrammarError(f"`{self._where}: {path}`: {problem}", hint=HINT)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _type(value: Any) -> str | None:
    listed = cast("list[Any]", value) if isinstance(value, list) else [value]
    wrong = [each for each in listed if each not in TYPES]
    return f"`{wrong[0]}` is no type; types are {', '.join(TYPES)}" if wrong or not listed else None


def _count(value: Any) -> str | None:
    is_whole = _is_number(value) and value >= 0 and value == int(value)
    return None if is_whole else f"`{value}` is no whole number from 0 on"


def _number(value: Any) -> str | None:
    return None if _is_number(value) else f"`{value}` is no number"


def _positive(value: Any) -> str | None:
    return None if _is_number(value) and value > 0 else f"`{value}` is no number above 0"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else f"`{value}` is no string"


def _names(value: Any) -> str | None:
    is_list = isinstance(value, list) and all(isinstance(each, str) for each in cast("list[Any]", value))
    return None if is_list else "not a list of names"


def _values(value: Any) -> str | None:
    return _value(cast("list[Any]", value)) if isinstance(value, list) and value else "not a list of values"


def _value(value: Any) -> str | None:
    """Refuse numbers that would come out as others."""
    if _is_number(value) and abs(value) > MAX_EXACT:
        return f"{value} is beyond {MAX_EXACT}, where numbers are no longer exact"
    inner = list(cast("Schema", value).values()) if isinstance(value, dict) else value
    return next(filter(None, map(_value, cast("list[Any]", inner))), None) if isinstance(inner, list) else None


def _num_keys(value: Any) -> int:
    """Names in the objects of an `enum` or `const`."""
    inner = list(cast("Schema", value).values()) if isinstance(value, dict) else value
    names = len(cast("Schema", value)) if isinstance(value, dict) else 0
    return names + sum(map(_num_keys, cast("list[Any]", inner))) if isinstance(inner, list) else 0


CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "type": _type,
    "enum": _values,
    "const": _value,
    "required": _names,
    "$ref": _text,
    "pattern": _text,
    "format": _text,
    "multipleOf": _positive,
    **dict.fromkeys(COUNTS, _count),
    **dict.fromkeys((*LOWER_BOUNDS, *UPPER_BOUNDS), _number),
}


def _has_open_end(clean: Schema) -> bool:
    """Whether numbers end before a whole one and less than 1 from it, where llguidance takes the whole one, too."""
    low, high = clean.get("exclusiveMinimum"), clean.get("exclusiveMaximum")
    bottom = max((clean[each] for each in LOWER_BOUNDS if each in clean), default=-math.inf)
    top = min((clean[each] for each in UPPER_BOUNDS if each in clean), default=math.inf)
    below = low is not None and low == int(low) and top < low + 1
    above = high is not None and high == int(high) and bottom > high - 1
    return clean.get("type") != "integer" and (below or above)


def _exact(clean: Schema) -> Schema:
    """Leave out formats that are notes; move bounds into what a float can say; counts become whole numbers."""
    if clean.get("format") not in (None, *FORMATS):
        del clean["format"]
    for keyword in clean.keys() & {*COUNTS}:
        clean[keyword] = int(clean[keyword])
    for keyword in clean.keys() & {*LOWER_BOUNDS}:
        clean[keyword] = -_largest_float(-clean[keyword])
    for keyword in clean.keys() & {*UPPER_BOUNDS}:
        clean[keyword] = _largest_float(clean[keyword])
    return clean


def _largest_float(bound: float) -> float:
    """The largest number up to `bound` that a float and 64 bits can say."""
    if not isinstance(bound, int) or abs(bound) <= MAX_EXACT:
        return bound
    bound = min(MAX_BOUND, bound)
    return int(float(bound) if float(bound) <= bound else math.nextafter(float(bound), -math.inf))


def _check_reference(part: Schema, root: Schema, where: str) -> None:
    """Refuse a `$ref` to something that is not in the schema; tell what type the alternatives of a `oneOf` are of.

    llguidance looks into a reference, to see that alternatives exclude each other, only if something stands beside it.
    """
    if "$ref" in part and _target(part["$ref"], root) is None:
        raise GrammarError(f"`{where}.$ref`: there is no schema `{part['$ref']}` here", hint="such as `#/$defs/name`")
    for alternative in part.get("oneOf", ()):
        target = _target(alternative["$ref"], root) if alternative and list(alternative) == ["$ref"] else None
        if isinstance(target, dict) and "type" in target:
            alternative |= {"type": target["type"], "$ref": alternative.pop("$ref")}


def _target(reference: str, root: Schema) -> Schema | bool | None:
    """Return what a `$ref` refers to; None if that is not in the schema."""
    target: Any = root
    for name in [] if reference == "#" else reference.split("/")[1:] if reference.startswith("#/") else [""]:
        if isinstance(target, list):
            target = dict(enumerate(cast("list[Any]", target))).get(int(name) if name.isdigit() else -1)
        else:
            target = cast("Schema", target).get(name) if isinstance(target, dict) else None
    return cast("Schema | bool", target) if isinstance(target, dict | bool) else None


def _parts(schema: Schema | bool, path: str) -> Iterator[tuple[str, Schema]]:
    """Yield the schemas in a checked schema, the innermost first, and at last itself, each with its path."""
    if isinstance(schema, bool):
        return
    for keyword, value in schema.items():
        at = f"{path}.{keyword}"
        if keyword in TABLES:
            for name, part in value.items():
                yield from _parts(part, f"{at}.{name}")
        elif isinstance(value, list) and keyword in (*LISTS, "items"):
            for i, part in enumerate(cast("list[Any]", value)):
                yield from _parts(part, f"{at}[{i}]")
        elif keyword in ONE:
            yield from _parts(cast("Schema | bool", value), at)
    yield path, schema


def _locate(root: Schema, problem: str) -> str:
    """Return the path of the innermost schema that has the problem by itself; that of the whole if it takes long."""
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    until = time.monotonic() + LOCATE_S
    for path, part in _parts(root, "$"):
        if find_problem(f"start: {to_lark({**part, **definitions})}") == problem:
            return path
        if time.monotonic() > until:
            break
    return "$"

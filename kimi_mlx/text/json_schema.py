"""Check JSON schemas of users, and rewrite them in the form that llguidance compiles to grammars.

An unsupported feature is an error with its location, a JSON path such as `$.properties.age.not`; in the schema of a
tool it is dropped instead, with a note. Annotations (titles, defaults, unknown keywords and formats) are dropped
silently, as JSON Schema requires.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn, cast
from urllib.parse import unquote

import llguidance

from kimi_mlx.errors import GrammarError
from kimi_mlx.text.digest_cache import DigestCache
from kimi_mlx.text.finite_schema import drop_endless, find_endless
from kimi_mlx.text.schema_bounds import check_value
from kimi_mlx.text.schema_rewrites import rewrite
from kimi_mlx.text.schema_values import CHECKS, COUNTS, LOWER_BOUNDS, UPPER_BOUNDS, largest_float, num_keys

Schema = dict[str, Any]
OnProblem = Callable[[str, str], None]
"""Called with the path of a keyword, such as `$.properties.age.not`, and the reason why it is not supported."""

MAX_DEPTH = 32
"""Maximum nesting of schemas."""
MAX_NAMES = {"patternProperties": 32, "required": 1_000, "properties": 1_000}
"""Maximum number of names in a whole schema: the time to compile an object grows with their square.

Other keywords count as `properties`."""
LOCATE_S = 0.3
"""Time limit for the search for the subschema with the error."""

MAX_COMPILATIONS = 4096
"""Maximum number of cached results of compilation."""

WHITESPACE = r"[ \t]{1,4}|\r?\n[ \t]{0,64}"
"""Whitespace between the parts of JSON, limited to the amounts that models usually write.

A confused model could otherwise write nothing else."""

SINGLE_SCHEMAS, SCHEMA_LISTS = (
    ("items", "additionalItems", "additionalProperties"),
    ("prefixItems", "anyOf", "oneOf", "allOf"),
)
SCHEMA_TABLES = ("properties", "patternProperties", "$defs", "definitions")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Formats that are enforced; others are annotations."""
DEPENDENT: Mapping[str, Sequence[str]] = {
    "properties": ("additionalProperties",),
    "patternProperties": ("additionalProperties",),
    "prefixItems": ("items",),
    "items": ("additionalItems",),
}
"""Keywords, each with those that depend on it and are dropped with it."""
UNSUPPORTED = (
    *("not", "if", "contains", "minContains", "maxContains", "propertyNames", "dependencies"),
    *("dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef"),
)
ANY_OBJECT: Schema = {"type": "object"}
NO_FORCING = '%llguidance {"no_forcing": true}'
"""Directive: llguidance does not tokenize forced text. The model chooses among the tokens that begin it."""
HINT = "see the supported features in docs/structured-output.md"


def check_schema(schema: Any, where: str, locates_problem: bool = True) -> Schema:
    """Return a schema without annotations, in the form that llguidance compiles.

    Args:
        schema: JSON schema, of draft 6 or later.
        where: name of the schema in error messages.
        locates_problem: True to search for the subschema that llguidance refuses, which takes up to LOCATE_S.

    Raises:
        GrammarError: it is not a schema, has an unsupported feature, is too large, or nothing satisfies it.
    """
    check_value(schema, where)
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"`{where}` is not plain JSON: {error}") from error
    if schema is False:
        raise GrammarError(f"`{where}` is `false`: nothing satisfies it")

    def refuse(path: str, problem: str) -> None:
        raise GrammarError(f"`{where}: {path}`: {problem}", hint=HINT)

    clean = clean_schema(schema, refuse)
    problem = find_problem(to_grammar(clean))
    if problem:
        refuse(locate(clean, problem)[0] if locates_problem else "$", problem)
    return clean


def clean_schema(schema: Any, on_problem: OnProblem) -> Schema:
    """Return a copy of a schema without annotations, which llguidance may still refuse.

    Args:
        schema: JSON schema; its size must have been checked.
        on_problem: callback for each keyword that is invalid or not supported. If it returns, the keyword is dropped,
            and others whose meaning depends on it, so that all instances of the schema satisfy the copy.
    """
    clean = SchemaCleaner(on_problem).clean(schema, "$", 0)
    for path, part in subschemas(clean, "$"):
        _check_reference(part, clean, path, on_problem)
    parts = [part for _, part in subschemas(clean, "$")]
    if any("$ref" in part for part in parts):
        endless = find_endless(parts, lambda reference: _target(reference, clean))
        if id(clean) in endless:
            on_problem("$", "only an infinite value satisfies it")
        else:
            drop_endless(parts, endless)
    return clean


def to_grammar(schema: Schema) -> str:
    """Return the grammar of a checked schema in llguidance's dialect of Lark."""
    return rule_grammar("%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}))


def rule_grammar(rule: str) -> str:
    """Return the grammar with one rule, given by its body in llguidance's dialect of Lark."""
    return f"{NO_FORCING}\nstart: {rule}"


def find_problem(grammar: str) -> str | None:
    """Return the reason why llguidance refuses a grammar, or that nothing satisfies it; None if it is valid.

    Takes a second at most, by the limits of llguidance and of this module. Results are cached.
    """
    return _compilations(grammar)[0]


def compile_s(grammar: str) -> float:
    """Return the CPU time in seconds to compile a grammar and its first mask."""
    return _compilations(grammar)[1]


def _compile(grammar: str) -> tuple[str | None, float]:
    began = time.thread_time()
    problem = _find_problem(grammar)
    return problem, time.thread_time() - began


def _find_problem(grammar: str) -> str | None:
    matcher = llguidance.LLMatcher(_byte_tokenizer(), grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
        return "nothing satisfies it" if matcher.is_error() else None
    return _reason(matcher.get_error())


_compilations = DigestCache(_compile, MAX_COMPILATIONS)


@cache
def _byte_tokenizer() -> llguidance.LLTokenizer:
    """Return a tokenizer with one token per byte."""
    return llguidance.LLTokenizer("byte")


def _reason(error: str) -> str:
    """Return the reason from an error of llguidance, as one line."""
    if "oneOf constraints are not supported" in error:
        return "`oneOf`: a value may match several alternatives; use `anyOf`"
    lines = error.splitlines()
    first_error = next((line for line in lines if line.startswith("error: ")), lines[0])
    return first_error.removeprefix("error: ").rpartition("JSON schema: ")[2].strip()


class _DropError(Exception):
    """A keyword is dropped."""


class SchemaCleaner:
    """Copies a schema, keyword by keyword.

    Args:
        on_problem: callback for each keyword that is invalid or not supported; if it returns, the keyword is dropped.
    """

    def __init__(self, on_problem: OnProblem):
        self._on_problem = on_problem
        self._counts: Counter[str] = Counter()

    def clean(self, schema: Any, path: str, depth: int) -> Schema:
        """Return a copy without annotations of a schema and of its subschemas."""
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            self._on_problem(path, "not a schema: it is neither an object nor true or false")
            return {}
        if depth > MAX_DEPTH:
            self._on_problem(path, f"schemas are nested deeper than {MAX_DEPTH}")
            return {}
        clean: Schema = {}
        source = rewrite(cast("Schema", schema))
        for keyword, value in source.items():
            at = f"{path}.{keyword}"
            try:
                if keyword in SCHEMA_TABLES:
                    clean[keyword] = self._table(keyword, value, at, depth)
                elif keyword in SCHEMA_LISTS or (keyword == "items" and isinstance(value, list)):
                    clean[keyword] = self._list(keyword, value, at, depth)
                elif keyword in SINGLE_SCHEMAS:
                    clean[keyword] = self._one(value, at, depth)
                elif keyword in ("then", "else"):  # a part of `if`
                    continue
                elif keyword in UNSUPPORTED or (keyword == "uniqueItems" and value is not False):
                    self._drop(at, "this schema feature is not supported")
                elif keyword in CHECKS:
                    clean[keyword] = self._value(keyword, value, at)
            except _DropError:
                continue
        for keyword in source.keys() - clean.keys() & DEPENDENT.keys():
            for dependent in DEPENDENT[keyword]:
                clean.pop(dependent, None)
        if clean.get("minProperties", 0) - len(set(clean.get("required", ()))) > 1:
            problem = "it may be at most 1 more than the number of `required` properties"
            self._on_problem(f"{path}.minProperties", problem)
            del clean["minProperties"]
        if _has_inexact_bound(clean):
            self._on_problem(path, "an exclusive integer bound less than 1 from the other bound is not supported")
            clean.pop("exclusiveMinimum", None)
            clean.pop("exclusiveMaximum", None)
        return _normalize(clean)

    def _value(self, keyword: str, value: Any, at: str) -> Any:
        problem = CHECKS[keyword](value)
        if problem:
            self._drop(at, problem)
        self._count(keyword, len(value) if keyword == "required" else num_keys(value), at)
        return value

    def _one(self, value: Any, at: str, depth: int) -> Schema | bool:
        return False if value is False else self.clean(value, at, depth + 1)

    def _list(self, keyword: str, value: Any, at: str, depth: int) -> list[Schema | bool]:
        if not isinstance(value, list) or (not value and keyword in ("anyOf", "oneOf", "allOf")):
            self._drop(at, "not a list of schemas")
        return [self._one(part, f"{at}[{i}]", depth) for i, part in enumerate(cast("list[Any]", value))]

    def _table(self, keyword: str, value: Any, at: str, depth: int) -> dict[str, Schema | bool]:
        if not isinstance(value, dict):
            self._drop(at, "not an object of schemas")
        table = cast("Schema", value)
        self._count(keyword, len(table), at)
        return {name: self._one(part, f"{at}.{name}", depth) for name, part in table.items()}

    def _count(self, keyword: str, names: int, at: str) -> None:
        kind = keyword if keyword in MAX_NAMES else "properties"
        self._counts[kind] += names
        if self._counts[kind] > MAX_NAMES[kind]:
            self._counts[kind] -= names
            self._drop(at, f"{kind} with more than {MAX_NAMES[kind]} names in the whole schema")

    def _drop(self, path: str, problem: str) -> NoReturn:
        self._on_problem(path, problem)
        raise _DropError


def _has_inexact_bound(clean: Schema) -> bool:
    """Return whether an exclusive integer bound is less than 1 from the other one: llguidance would allow the bound."""
    low, high = clean.get("exclusiveMinimum"), clean.get("exclusiveMaximum")
    bottom = max((clean[key] for key in LOWER_BOUNDS if key in clean), default=-math.inf)
    top = min((clean[key] for key in UPPER_BOUNDS if key in clean), default=math.inf)
    below = low is not None and low == int(low) and top < low + 1
    above = high is not None and high == int(high) and bottom > high - 1
    return clean.get("type") != "integer" and (below or above)


def _normalize(clean: Schema) -> Schema:
    """Drop formats that are annotations, move bounds to exact floats, and convert counts to int."""
    if clean.get("format") not in (None, *FORMATS):
        del clean["format"]
    for keyword in clean.keys() & {*COUNTS}:
        clean[keyword] = int(clean[keyword])
    for keyword in clean.keys() & {*LOWER_BOUNDS}:
        clean[keyword] = -largest_float(-clean[keyword])
    for keyword in clean.keys() & {*UPPER_BOUNDS}:
        clean[keyword] = largest_float(clean[keyword])
    return clean


def _check_reference(part: Schema, root: Schema, path: str, on_problem: OnProblem) -> None:
    """Check that a `$ref` has a target in the schema, and add the type to references in a `oneOf`.

    llguidance must see that the alternatives exclude each other. It follows a reference only if there is another
    keyword next to it.
    """
    if "$ref" in part and _target(part["$ref"], root) is None:
        on_problem(
            f"{path}.$ref", f"no schema `{part['$ref']:.80}` in this schema; use a reference such as `#/$defs/name`"
        )
        del part["$ref"]
    for alternative in part.get("oneOf", ()):
        target = _target(alternative["$ref"], root) if alternative and list(alternative) == ["$ref"] else None
        if isinstance(target, dict) and "type" in target:
            alternative |= {"type": target["type"], "$ref": alternative.pop("$ref")}


def _target(reference: str, root: Schema) -> Schema | bool | None:
    """Return the target of a `$ref`; None if it is not in the schema."""
    target: Any = root
    names = [] if reference == "#" else reference.split("/")[1:] if reference.startswith("#/") else [""]
    for name in map(_unescape, names):
        if isinstance(target, list):
            target = {str(index): item for index, item in enumerate(cast("list[Any]", target))}.get(name)
        else:
            target = cast("Schema", target).get(name) if isinstance(target, dict) else None
    return cast("Schema | bool", target) if isinstance(target, dict | bool) else None


def _unescape(name: str) -> str:
    """Return the name of a step in a JSON pointer, which may be URL-encoded.

    Source: RFC 6901, sections 4 and 6.
    """
    return unquote(name).replace("~1", "/").replace("~0", "~")


def subschemas(schema: Schema | bool, path: str) -> Iterator[tuple[str, Schema]]:
    """Yield the subschemas of a checked schema with their paths, innermost first, and the schema itself last."""
    if isinstance(schema, bool):
        return
    for keyword, value in schema.items():
        at = f"{path}.{keyword}"
        if keyword in SCHEMA_TABLES:
            for name, part in value.items():
                yield from subschemas(part, f"{at}.{name}")
        elif isinstance(value, list) and keyword in (*SCHEMA_LISTS, "items"):
            for i, part in enumerate(cast("list[Any]", value)):
                yield from subschemas(part, f"{at}[{i}]")
        elif keyword in SINGLE_SCHEMAS:
            yield from subschemas(cast("Schema | bool", value), at)
    yield path, schema


def locate(root: Schema, problem: str) -> tuple[str, Schema]:
    """Return the innermost subschema with a problem, with its path; the whole schema if the search takes too long."""
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    deadline = time.monotonic() + LOCATE_S
    for path, part in subschemas(root, "$"):
        if find_problem(to_grammar({**part, **definitions})) == problem:
            return path, part
        if time.monotonic() > deadline:
            break
    return "$", root

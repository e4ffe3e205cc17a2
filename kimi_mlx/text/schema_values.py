"""Checks of the values of keywords in JSON schemas: types, numbers, names and constants."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

Schema = dict[str, Any]

MAX_EXACT = 2**53
"""Integers up to this value are exact as floats, in which llguidance computes."""
MAX_BOUND = 2**63 - 1024
"""The largest float that fits in 64 bits; larger bounds are reduced to it."""
MAX_FLOAT = sys.float_info.max

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
LOWER_BOUNDS, UPPER_BOUNDS = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _type(value: Any) -> str | None:
    listed = cast("list[Any]", value) if isinstance(value, list) else [value]
    unknown = [name for name in listed if name not in TYPES]
    if not unknown and listed:
        return None
    return f"`{unknown[0] if unknown else value}` is not a type; types are {', '.join(TYPES)}"


def _count(value: Any) -> str | None:
    is_whole = _is_number(value) and value >= 0 and value == int(value)
    return None if is_whole else f"`{value}` is not a whole number of 0 or more"


def _number(value: Any) -> str | None:
    if not _is_number(value):
        return f"`{value}` is not a number"
    return f"a number beyond {MAX_FLOAT:.2g} is not supported" if abs(value) > MAX_FLOAT else None


def _positive(value: Any) -> str | None:
    return _number(value) or (None if value > 0 else f"`{value}` is not a number above 0")


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else f"`{value}` is not a string"


def _names(value: Any) -> str | None:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in cast("list[Any]", value))
    return None if is_list else "not a list of names"


def _values(value: Any) -> str | None:
    return _value(cast("list[Any]", value)) if isinstance(value, list) and value else "not a list of values"


def _value(value: Any) -> str | None:
    """Return an error for numbers that would be rounded."""
    if _is_number(value) and abs(value) > MAX_EXACT:
        return f"{value} is beyond {MAX_EXACT}, where numbers are not exact"
    inner = list(cast("Schema", value).values()) if isinstance(value, dict) else value
    return next(filter(None, map(_value, cast("list[Any]", inner))), None) if isinstance(inner, list) else None


def num_keys(value: Any) -> int:
    """Return the number of names in the objects of an `enum` or `const`."""
    inner = list(cast("Schema", value).values()) if isinstance(value, dict) else value
    names = len(cast("Schema", value)) if isinstance(value, dict) else 0
    return names + sum(map(num_keys, cast("list[Any]", inner))) if isinstance(inner, list) else 0


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
"""Function for each keyword that returns the reason why a value is invalid or not supported; None if it is valid."""


def largest_float(bound: float) -> float:
    """Return the largest number up to `bound` that is exact as a float and fits in 64 bits."""
    if not isinstance(bound, int) or abs(bound) <= MAX_EXACT:
        return bound
    bound = min(MAX_BOUND, bound)
    return int(float(bound) if float(bound) <= bound else math.nextafter(float(bound), -math.inf))

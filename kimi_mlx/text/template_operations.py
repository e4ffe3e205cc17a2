"""Filters, tests and functions of chat templates, with the size of each result checked before it is computed."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, cast

import jinja2

from kimi_mlx.text.template_budget import (
    ENTRY_CHARS,
    MAX_INTEGER_BITS,
    MAX_SPLIT_CHARS,
    MAX_STEPS,
    Budget,
    TemplateLimitError,
    budget,
    check_chars,
    count_steps,
    is_container,
)

CONVERSION = re.compile(r"%(?:%|(?:\([^()]*\))?([^a-zA-Z%(]*)(\(?))")
"""A conversion of a `%` format: its flags, width and precision, and a parenthesis if its key has parentheses."""
MAX_WIDTH = 1_000
"""Limit of widths, indents and precisions, and of the length of texts that name something, such as an attribute."""
MAX_SEARCH_CHARS = 64
"""Limit of a text to search from the end and of a set of characters to strip: both take time times its length."""

MAX_GROWTH: Mapping[str, int] = {
    **dict.fromkeys(["capitalize", "casefold", "lower", "swapcase", "title", "upper"], 3),
    **dict.fromkeys(["e", "escape", "forceescape"], 6),
}
"""Largest number of characters that a method or filter makes of one, by its name."""
SLOW_SEARCHES = frozenset(["lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"])

ITERATING = "batch groupby join list map max min reject rejectattr select selectattr slice sort unique"
ITERATING_FILTERS = frozenset(ITERATING.split())
"""Filters that visit every entry of their input."""
OTHER_FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float forceescape format indent int items last length"
    " lower replace reverse round safe string title trim truncate upper"
)
SAFE_FILTERS = (*ITERATING_FILTERS, *OTHER_FILTERS.split())
"""Filters that a template may use, besides `tojson`."""


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose text does not show its values, which could be a namespace again without end."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _bounded_range(*bounds: int) -> range:
    """Return a range, if it is not longer than MAX_STEPS."""
    steps = range(*bounds)
    if len(steps) > MAX_STEPS:
        raise TemplateLimitError(f"loops take more than {MAX_STEPS} steps")
    return steps


def concat(parts: Iterable[str]) -> str:
    """Join the output of a template, a macro or a block."""
    limits = budget()
    total = 0
    texts: list[str] = []
    for part in parts:
        total = check_chars(total + len(part))
        texts.append(part)
        limits.step()
    return limits.charge("".join(texts))


def length_of(value: Any) -> int:
    """Return a text's number of characters, or a sequence's as `ENTRY_CHARS` for each entry; 0 for other values."""
    if isinstance(value, str):
        return len(value)
    return ENTRY_CHARS * len(cast("list[Any]", value)) if isinstance(value, list | tuple) else 0


def output_text(value: Any) -> Any:
    """Return what `{{ value }}` writes, with lists and objects converted to text."""
    return as_text(value) if is_container(value) else value


def as_text(value: Any) -> str:
    """Return a value as text."""
    if isinstance(value, str):
        return value
    limits = budget()
    limits.size(value)
    return limits.charge(str(value))


def check_product(limits: Budget, left: Any, right: Any) -> None:
    """Check the size of `left * right`."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
            raise TemplateLimitError("`*` makes a number that is too large")
        return
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            check_chars(length_of(sequence) * max(count, 0))


def check_method(limits: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check the size of the result of a string method, if it can be larger than its inputs."""
    values = [*args, *kwargs.values()]
    _check_text(name, text, values)
    if name == "replace":
        _check_replace(text, *values[:2])
    elif name == "join":
        parts = values[0] if values else ()
        check_chars(limits.size(parts) + len(text) * len(cast("list[Any]", parts)))
    elif name in ("split", "rsplit", "splitlines"):
        separator = values[0] if values and name != "splitlines" else None
        if not (isinstance(separator, str) and separator):
            _check_length(text)
        else:
            limits.step(text.count(separator))


def _check_text(name: str, text: str, options: list[Any]) -> None:
    """Check what string methods and filters of the same names have in common."""
    check_chars(MAX_GROWTH.get(name, 1) * len(text))
    searched = [option for option in options if isinstance(option, str)] if name in SLOW_SEARCHES else []
    if any(len(option) > MAX_SEARCH_CHARS for option in searched):
        raise TemplateLimitError(f"a text of more than {MAX_SEARCH_CHARS} characters is too large for `{name}`")


def _check_replace(text: str, old: Any = "", new: Any = "", *_: Any) -> None:
    old, new = str(old), str(new)
    check_chars(len(text) + text.count(old) * max(len(new) - len(old), 0))


def _check_length(text: str) -> None:
    if len(text) > MAX_SPLIT_CHARS:
        raise TemplateLimitError(f"a text of {len(text)} characters is too large to be split")


def _check_width(value: Any) -> None:
    width = len(value) if isinstance(value, str) else value
    if isinstance(width, int) and abs(width) > MAX_WIDTH:
        raise TemplateLimitError(f"a width of {width} is too large")


def format_percent(limits: Budget, text: str, values: Any) -> str:
    """Return `text % values` if its widths and its values are small enough."""
    for conversion, parenthesis in CONVERSION.findall(text):
        if "*" in conversion or parenthesis:
            raise TemplateLimitError("`*` and keys with parentheses are not available in a format")
        for digits in re.findall(r"\d+", conversion):
            _check_width(int(digits[:9]))
    check_chars(len(text) + text.count("%") * (MAX_WIDTH + limits.size(values)))
    return text % values


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts its work and its result."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        limits = budget()
        limits.step()
        before, (value, *options) = args[:first], args[first:]
        limits.size(value)
        if name in ITERATING_FILTERS:
            value = list(count_steps(value))
            limits.charge(value)
        _check_filter(limits, name, value, [*options, *kwargs.values()])
        if name in ("e", "escape", "forceescape", "safe"):  # plain text, because `Markup` escapes text added to it
            return limits.charge("".join((function(*before, value), "")))
        if name == "format":
            return limits.charge(format_percent(limits, str(value), kwargs or tuple(options)))
        result = function(*before, value, *options, **kwargs)
        return count_steps(cast("Iterator[Any]", result)) if isinstance(result, Iterator) else limits.charge(result)

    return run


def _check_filter(limits: Budget, name: str, value: Any, options: list[Any]) -> None:
    """Check the size of the result of a filter, if it can be much larger than its input."""
    for option in options:
        limits.size(option)
        if name not in ("replace", "join", "default", "d", "format"):
            _check_width(option if isinstance(option, str) else 0)
    if isinstance(value, str):
        _check_text(name, value, options)
    if name == "replace":
        _check_replace(str(value), *options)
    elif name == "int":
        _check_width(value if isinstance(value, str) else 0)
    elif name == "join":
        separator = next((option for option in options if isinstance(option, str)), "")
        check_chars(limits.size(value) + len(separator) * len(value))
    elif name == "title":
        _check_length(str(value))
    elif name in ("indent", "round", "tojson", "batch", "slice"):
        for option in options:
            _check_width(option)
            if isinstance(option, list | tuple) and limits.size(option) > MAX_WIDTH:
                raise TemplateLimitError("separators of JSON are too long")
        if name == "indent":
            width = max([4, *(len(option) if isinstance(option, str) else int(option) for option in options)])
            text = str(value)
            check_chars(len(text) + (text.count("\n") + 1) * width)


def _bounded_test(test: Callable[..., Any]) -> Callable[..., Any]:
    """Return a test (`x is eq(y)`) that counts its work."""

    @functools.wraps(test)
    def run(*args: Any) -> Any:
        limits = budget()
        limits.step()
        for value in args:
            limits.size(value)
        return test(*args)

    return run


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as Hugging Face's templates expect it: without HTML escapes or Unicode escapes."""
    check_chars(
        budget().size(value) * (12 if ensure_ascii else 1)
    )  # an emoji is written as two escapes of 6 characters
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    return concat(encoder.iterencode(value))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > MAX_WIDTH or re.search(r"%[^a-zA-Z%]*\d", pattern):
        raise TemplateLimitError("a date pattern with a width is not available")
    return datetime.now().strftime(pattern)


FUNCTIONS: Mapping[str, Any] = {
    "dict": dict,
    "namespace": _Namespace,
    "raise_exception": _raise_exception,
    "range": _bounded_range,
    "strftime_now": _strftime_now,
}
"""Functions that a template may call."""


def bounded_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return the filters that a template may use, each with limits.

    Args:
        filters: jinja2's filters by name.
    """
    safe = {name: filters[name] for name in SAFE_FILTERS} | {"tojson": _to_json}
    return {name: _bounded_filter(name, function) for name, function in safe.items()}


def bounded_tests(tests: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return jinja2's tests (`x is eq(y)`), each with limits."""
    return {name: _bounded_test(test) for name, test in tests.items()}

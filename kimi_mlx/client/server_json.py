"""JSON from a server, which may be any program: what the client could not handle is refused in one place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

MAX_DEPTH = 100
MAX_DIGITS = 18
"""Number of digits of an integer that always fits 64 bits."""

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def parse_server_json(data: str | bytes) -> Any:
    """Return the value of a JSON text. Halves of surrogate pairs, which cannot be stored or sent, become U+FFFD.

    Raises:
        ValueError: the text is not JSON, is nested more than MAX_DEPTH deep, or has a number that is not finite or does
            not fit 64 bits.
    """
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "replace")
    try:
        value: Any = json.loads(text, parse_constant=_refuse, parse_float=_parse_float, parse_int=_parse_int)
        if _HALF_PAIR.search(text):
            escaped = json.dumps(value, ensure_ascii=False)
            value = json.loads(escaped.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except RecursionError:
        raise ValueError("the values are nested too deeply") from None
    _check_depth(value)
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"`{text:.20}` is not a number that JSON can have here")


def _parse_float(text: str) -> float:
    value = float(text)
    return _refuse(text) if abs(value) == float("inf") else value


def _parse_int(text: str) -> int:
    return _refuse(text) if len(text) > MAX_DIGITS else int(text)


def _check_depth(value: Any) -> None:
    """Refuse values that are nested too deeply, level by level."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        containers: list[Any] = [part for part in level if isinstance(part, list | dict)]
        if not containers:
            return
        level = [item for part in containers for item in _items(part)]
    raise ValueError("the values are nested too deeply")


def _items(container: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container

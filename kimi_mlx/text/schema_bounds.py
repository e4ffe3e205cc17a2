"""Bounds on the schemas of a request, checked before any other work, so that a refusal takes milliseconds.

Rendering, checking and compiling a schema take time that grows with its size and its depth, faster than linearly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from kimi_mlx.errors import GrammarError

MAX_TOOLS = 512
"""Maximum number of tools of a request."""

MAX_CHARS = 200_000
"""Maximum number of characters of a schema as JSON, without whitespace and escapes."""

MAX_TOTAL_CHARS = 2_000_000
"""Maximum number of characters of all schemas of a request."""

MAX_NESTING = 80
"""Maximum nesting of objects and lists in a schema: 32 levels of schemas, each in a list or a table of its own."""

MAX_DIGITS = 1_000
"""Maximum number of digits of an integer; Python refuses to print more than 4,300."""

BITS_PER_DIGIT = 3.33
"""Slightly more than log2(10), so that an integer of MAX_DIGITS digits passes."""


def check_bounds(
    tools: Sequence[Mapping[str, Any]],
    response_schema: Any = None,
    schema_name: str = "response_format",
    tool_places: Sequence[str] = (),
) -> None:
    """Check number, size and nesting of all schemas of a request.

    Args:
        tools: OpenAI-style tools, whether their schemas are enforced or not.
        response_schema: JSON schema of the answer, if any.
        schema_name: name of that schema in error messages.
        tool_places: locations of the tools for error messages; empty for `tools[0]` and so on.

    Raises:
        GrammarError: a bound is exceeded; the message begins with the location.
    """
    if len(tools) > MAX_TOOLS:
        raise GrammarError(f"`tools` has {len(tools)} tools; at most {MAX_TOOLS} are allowed", hint="send fewer tools")
    total = check_value(response_schema, schema_name)
    for i, tool in enumerate(tools):
        total += check_value(tool, tool_places[i] if tool_places else f"tools[{i}]")
        if total > MAX_TOTAL_CHARS:
            raise GrammarError(
                f"`tools` have more than {MAX_TOTAL_CHARS} characters together", hint="send fewer or smaller tools"
            )


def check_value(value: Any, where: str) -> int:
    """Return the number of characters of a JSON value; stop as soon as a bound is exceeded.

    Args:
        value: value made of the types of JSON.
        where: name of the value in error messages.

    Raises:
        GrammarError: the value is too large or nested too deeply, or has an integer with too many digits.
    """
    chars, depth = 0, 0
    level: list[Any] = [value]
    while level:  # one level of nesting after the other, because recursion is limited
        if depth > MAX_NESTING:
            raise GrammarError(f"`{where}` is nested deeper than {MAX_NESTING} levels", hint="simplify the schema")
        inner: list[Any] = []
        for item in level:
            chars += _own_chars(item, where)
            if isinstance(item, Mapping):
                inner += cast("Mapping[str, Any]", item).values()
            elif isinstance(item, list | tuple):
                inner += cast("Sequence[Any]", item)
            if chars > MAX_CHARS:
                raise GrammarError(
                    f"`{where}` has more than {MAX_CHARS} characters", hint="simplify the schema, or split it"
                )
        level, depth = inner, depth + 1
    return chars


def _own_chars(item: Any, where: str) -> int:
    """Return the number of characters of a value without the values in it, punctuation included."""
    if isinstance(item, str):
        return len(item) + 2
    if isinstance(item, Mapping):
        names = cast("Mapping[str, Any]", item)
        return 2 + sum(len(name) + 4 for name in names)
    if isinstance(item, list | tuple):
        return 2 + len(cast("Sequence[Any]", item))
    if isinstance(item, int):
        digits = int(item.bit_length() / BITS_PER_DIGIT)
        if digits > MAX_DIGITS:
            raise GrammarError(
                f"`{where}` has an integer of more than {MAX_DIGITS} digits", hint="use a smaller number"
            )
        return digits + 1
    return 4

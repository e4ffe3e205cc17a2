"""JSON bodies: parsing of requests, with errors that name the location, and JSON responses.

Bodies may be in UTF-8, UTF-16 or UTF-32, with or without a byte order mark. Halves of surrogate pairs, from texts that
were cut inside an emoji, become U+FFFD. Of names that appear twice, the last one counts. Refused are NaN and Infinity,
which are not JSON, and numbers that no float can represent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from kimi_mlx.server.errors import ApiError

MAX_DEPTH = 200
"""Maximum nesting of a body."""

MAX_CONTAINERS = 50_000
"""Maximum number of lists and objects in a body: a conversation that fits a context of 256 k tokens has fewer."""

MAX_FIELDS = 250_000
"""Maximum number of fields of all objects in a body."""

MAX_STRINGS = 500_000
"""Maximum number of strings in a body, names of fields included."""

MAX_VALUES = 1_100_000
"""Maximum number of values in a body: slightly more than the token ids of the longest prompts."""

MAX_DIGITS = 308
"""Maximum number of digits of an integer: larger ones cannot be converted to a float."""

ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a surrogate pair
    r"|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
STRING = re.compile('"[^"]*"?')
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class Body(BaseModel):
    """A request body or a part of one: strict types without conversion; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parse(model: type[AnyBody], data: bytes) -> AnyBody:
    """Parse a body.

    Raises:
        ApiError: 400, the body is invalid; `param` is the location of the error.
    """
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _most_relevant(error.errors(include_url=False), cast("object", value)) from error


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ApiError: 400, the text is not JSON, or has too many or too deeply nested values.
    """
    text = _decode(data)
    if not text.strip():
        raise ApiError(400, "the body is empty; send a JSON object", "invalid_json")
    if HALF_PAIR.search(text):
        text = ESCAPE.sub(lambda match: r"\ufffd" if match["half"] else match[0], text)
    _check_counts(text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float, parse_int=_parse_int)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not valid JSON: {error.msg} at {place}", "invalid_json") from error
    _check_depth(value)
    return value


def _check_counts(text: str) -> None:
    """Refuse a JSON text with too many values, before they are parsed and checked, which takes seconds per million."""
    without_quotes = text.replace("\\\\", "").replace('\\"', "")  # escaped backslashes and quotes, in this order
    bare, num_strings = STRING.subn("", without_quotes, MAX_STRINGS + 1)
    counts = {
        "strings": (num_strings, MAX_STRINGS),
        "lists and objects": (bare.count("[") + bare.count("{"), MAX_CONTAINERS),
        "fields": (bare.count(":"), MAX_FIELDS),
        "values": (bare.count(","), MAX_VALUES),
    }
    for name, (count, limit) in counts.items():
        if count > limit:
            raise ApiError(400, f"the body has more than {limit:,} {name}; send less", "invalid_value")


def _decode(data: bytes) -> str:
    """Decode a JSON text. Its first bytes show which of the encodings it has."""
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        message = f"the body is not valid {encoding.removesuffix('-sig').upper()}: byte {error.start}: {error.reason}"
        raise ApiError(400, message, "invalid_json") from error
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of surrogate pairs
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.removeprefix("\ufeff")  # of UTF-16 or UTF-32 with explicit byte order


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"the body is not valid JSON: `{name}` is not a JSON value; send null", "invalid_json")


def _parse_float(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ApiError(400, f"the number `{text:.20}` is too large", "invalid_json")
    return value


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ApiError(400, f"the integer `{text:.20}...` has more than {MAX_DIGITS} digits", "invalid_json")
    return int(text)


def _check_depth(value: Any) -> None:
    """Refuse values that are nested too deeply; level by level."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        containers: list[Any] = [part for part in level if isinstance(part, list | dict)]
        if not containers:
            return
        level = [item for part in containers for item in _items(part)]
    raise _too_deep()


def _items(part: Any) -> Iterable[Any]:
    return cast("dict[str, Any]", part).values() if isinstance(part, dict) else part


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels", "invalid_value")


def _most_relevant(errors: Sequence[ErrorDetails], body: object) -> ApiError:
    """Return the most relevant error.

    If a field allows several types, pydantic reports the errors of each. We prefer an error about a value of the right
    type to an error about the type. Of these we prefer the deepest, then the last in its list: it belongs to the type
    that fits best.
    """

    def relevance(error: ErrorDetails) -> tuple[bool, int, list[int]]:
        path = location(error, body)
        indices = [part for part in error["loc"] if isinstance(part, int)]
        return _has_right_type(error), path.count(".") + path.count("["), indices

    first = max(errors, key=relevance)
    param = location(first, body)
    same_value = [error for error in errors if error["input"] is first["input"] and location(error, body) == param]
    message = _message(same_value)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"`{param}`: {message}" if param else message, code, param or None)


def _has_right_type(error: ErrorDetails) -> bool:
    if error["type"] == "literal_error":
        return isinstance(error["input"], str)
    return not error["type"].endswith("_type")


TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
"""Names of the types in pydantic's errors."""

MESSAGES = {
    "missing": "required field is missing",
    "too_long": "has {actual_length} items, but at most {max_length} are allowed",
    "too_short": "has {actual_length} items, but at least {min_length} are required",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "greater_than": "is {input:.30}, but must be more than {gt}",
    "greater_than_equal": "is {input:.30}, but must be at least {ge}",
    "less_than": "is {input:.30}, but must be less than {lt}",
    "less_than_equal": "is {input:.30}, but must be at most {le}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "the name must be a token id of 1 to 9 digits",
}
"""Our messages for pydantic's most common error types."""


def _message(errors: Sequence[ErrorDetails]) -> str:
    """Return the message for the errors of one value: of the types it may have, if it has none of them."""
    if not any(map(_has_right_type, errors)) and all(error["type"] in (*TYPES, "literal_error") for error in errors):
        names = [TYPES.get(error["type"]) or error.get("ctx", {})["expected"] for error in errors]
        return f"must be {' or '.join(dict.fromkeys(names))}"
    error = next((error for error in errors if _has_right_type(error)), errors[0])
    message = MESSAGES.get(error["type"])
    return (
        error["msg"].removeprefix("Value error, ")
        if message is None
        else message.format(**error.get("ctx", {}), input=str(error["input"]))
    )


def location(error: ErrorDetails, body: object) -> str:
    """Return the location of an error in OpenAI's format, `messages[0].content`, without pydantic's type names."""
    paths = list(_paths(error["loc"], body, is_missing=error["type"] == "missing"))
    exact = (path for path, value in paths if value is error["input"])
    return next(exact, paths[0][0])


def _paths(
    loc: Sequence[int | str], value: object, path: str = "", *, is_missing: bool
) -> Iterator[tuple[str, object]]:
    """Yield the paths that a location of pydantic may mean, with the values there, most likely first.

    A location contains the names of types beside those of fields, and a field may have the name of a type.

    Args:
        loc: rest of the location.
        value: value at the path so far.
        path: path so far.
        is_missing: whether the last part is the name of a missing field.
    """
    if not loc:
        yield path, value
        return
    part, rest = loc[0], loc[1:]
    if is_missing and not rest:
        yield _field(path, part), value
        return
    if isinstance(part, int) and isinstance(value, list) and part < len(cast("list[object]", value)):
        yield from _paths(rest, cast("list[object]", value)[part], f"{path}[{part}]", is_missing=is_missing)
        return
    if isinstance(value, dict) and part in value:
        inner = cast("dict[str | int, object]", value)[part]
        yield from _paths(rest, inner, _field(path, part), is_missing=is_missing)
    yield from _paths(rest, cast("object", value), path, is_missing=is_missing)


def _field(path: str, name: int | str) -> str:
    return f"{path}.{name}" if path else str(name)


class JsonResponse(Response):
    """A JSON response; characters that UTF-8 cannot encode become question marks."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the encoded body."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(errors="replace")

"""Bodies of requests: JSON to values, with errors that name the place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json

from kimi_mlx.server.errors import ApiError


class Body(BaseModel):
    """A part of a body: types as they are written, no conversions; unknown fields are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parse(kind: type[AnyBody], text: bytes) -> AnyBody:
    """Read a body.

    Raises:
        ApiError: 400, with the place of the first mistake.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {first['msg']}", "invalid_json") from error
        raise _mistake(error, from_json(text)) from error


def _mistake(error: ValidationError, body: object) -> ApiError:
    """The mistake that lies deepest: of several kinds that a value may have, the one that it comes nearest to."""
    found = [(place(each["loc"], body), each) for each in error.errors(include_url=False)]
    param, first = max(found, key=lambda each: (each[0].count(".") + each[0].count("["), _is_of_right_type(each[1])))
    message = _words(first)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"`{param}`: {message}" if param else message, code, param or None)


WORDS = {
    "missing": "it is missing",
    "too_long": "it has {actual_length} items, at most {max_length} are taken",
    "too_short": "it has {actual_length} items, at least {min_length} are needed",
    "string_too_long": "it is longer than {max_length} characters",
    "string_too_short": "it is shorter than {min_length} characters",
    "greater_than": "it must be more than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
    "literal_error": "it must be {expected}",
    "string_type": "it must be a string",
    "int_type": "it must be an integer",
    "float_type": "it must be a number",
    "bool_type": "it must be true or false",
    "list_type": "it must be a list",
    "dict_type": "it must be an object",
    "model_type": "it must be an object",
}
"""The library's commonest mistakes, in our words."""


def _words(error: ErrorDetails) -> str:
    words = WORDS.get(error["type"])
    return error["msg"].removeprefix("Value error, ") if words is None else words.format(**error.get("ctx", {}))


def place(loc: Sequence[str | int], body: object) -> str:
    """Where in the body, as OpenAI writes it: `messages[0].content`; names of types, which pydantic adds, left out."""
    text = ""
    for at, part in enumerate(loc):
        if isinstance(part, int) and isinstance(body, list):
            text += f"[{part}]"
            body = cast("list[object]", body)[part]
        elif isinstance(body, dict) and (part in body or at == len(loc) - 1):
            text += f".{part}" if text else str(part)
            body = cast("dict[str | int, object]", body).get(part)
    return text


def _is_of_right_type(error: ErrorDetails) -> bool:
    return not error["type"].endswith("_type")

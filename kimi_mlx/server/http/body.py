"""JSON bodies: parsing of requests, with errors that name the location, and JSON responses."""

from __future__ import annotations

import json
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.responses import Response

from kimi_mlx.server.errors import ApiError


class Body(BaseModel):
    """A request body or a part of one: strict types without conversion; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parse(model: type[AnyBody], text: bytes) -> AnyBody:
    """Parse a body.

    Raises:
        ApiError: 400, the body is invalid; `param` is the location of the error.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not valid JSON: {first['msg']}", "invalid_json") from error
        raise _most_relevant(error, from_json(text)) from error


def _most_relevant(validation: ValidationError, body: object) -> ApiError:
    """Return the most relevant error.

    If a field allows several types, pydantic reports the errors of each. We prefer an error about a value of the right
    type to an error about the type, and then the deepest error, which belongs to the type that fits best.
    """
    errors = [(location(error, body), error) for error in validation.errors(include_url=False)]
    param, first = max(errors, key=lambda error: (_has_right_type(error[1]), error[0].count(".") + error[0].count("[")))
    message = _message(first)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"`{param}`: {message}" if param else message, code, param or None)


def _has_right_type(error: ErrorDetails) -> bool:
    if error["type"] == "literal_error":
        return isinstance(error["input"], str)
    return not error["type"].endswith("_type")


MESSAGES = {
    "missing": "required field is missing",
    "too_long": "has {actual_length} items, but at most {max_length} are allowed",
    "too_short": "has {actual_length} items, but at least {min_length} are required",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
}
"""Our messages for pydantic's most common error types."""


def _message(error: ErrorDetails) -> str:
    message = MESSAGES.get(error["type"])
    return error["msg"].removeprefix("Value error, ") if message is None else message.format(**error.get("ctx", {}))


def location(error: ErrorDetails, body: object) -> str:
    """Return the location of an error in OpenAI's format, `messages[0].content`, without pydantic's type names."""
    text = ""
    loc = error["loc"]
    missing_at = len(loc) - 1 if error["type"] == "missing" else None
    for at, part in enumerate(loc):
        if isinstance(part, int) and isinstance(body, list):
            text += f"[{part}]"
            body = cast("list[object]", body)[part]
        elif isinstance(body, dict) and (part in body or at == missing_at):
            text += f".{part}" if text else str(part)
            body = cast("dict[str | int, object]", body).get(part)
    return text


class JsonResponse(Response):
    """A JSON response; characters that UTF-8 cannot encode become question marks."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the encoded body."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(errors="replace")

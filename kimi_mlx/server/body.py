"""Bodies of requests: JSON to values, with errors that name the place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from kimi_mlx.server.errors import ApiError


class Body(BaseModel):
    """A part of a body: types as they are written, no conversions; unknown fields are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())


AnyBody = TypeVar("AnyBody", bound=Body)


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
        raise _mistake(error) from error


def _mistake(error: ValidationError) -> ApiError:
    """The mistake that lies deepest: of several kinds that a value may have, the one that it comes nearest to."""
    found = [(place(each["loc"]), each) for each in error.errors(include_url=False)]
    param, first = max(found, key=lambda each: each[0].count(".") + each[0].count("["))
    message = first["msg"].removeprefix("Value error, ")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"`{param}`: {message}" if param else message, code, param or None)


def place(loc: Sequence[str | int]) -> str:
    """Where in the body, as OpenAI writes it: `messages[0].content`; names of types, which pydantic adds, left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in TYPE_NAMES and not part.startswith(("list[", "dict[", "function-", "constrained-")):
            text += f".{part}" if text else part
    return text


TYPE_NAMES = frozenset({"str", "int", "float", "bool", "Part", "NamedChoice", "literal['auto','none','required']"})


def as_dict(value: object) -> dict[str, Any]:
    """A value that is known to be an object."""
    return cast("dict[str, Any]", value)

"""Field types, validators and checks shared by the request bodies of several APIs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import Field
from pydantic_core import PydanticCustomError

from kimi_mlx.server.errors import ApiError

MIN_TOP_P = 1e-6
"""Replaces a `top_p` of 0, which would leave no token."""

TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
StopText = Annotated[str, Field(min_length=1)]

UNSUPPORTED = "unsupported"


def type_discriminator(
    supported: Collection[str], default: Callable[[Any], str | None] = lambda _: None
) -> Callable[[Any], str]:
    """Return a discriminator for pydantic: the `type` of a part, or UNSUPPORTED if that is not supported.

    Args:
        supported: supported types.
        default: function that returns the type of a part that has no `type`.
    """

    def type_of(value: Any) -> str:
        kind: Any = (
            cast("dict[str, Any]", value).get("type") if isinstance(value, dict) else getattr(value, "type", None)
        )
        kind = kind or default(value)
        return kind if kind in supported else UNSUPPORTED

    return type_of


def text_shorthand(**part: Any) -> Callable[[Any], Any]:
    """Return a validator for pydantic that turns a plain string into a list with one part that has it as `text`."""

    def to_parts(value: Any) -> Any:
        if not isinstance(value, str | list):
            raise PydanticCustomError("string_or_list_type", "must be a string or a list")
        return [{**part, "text": value}] if isinstance(value, str) else value  # pyright: ignore[reportUnknownVariableType]

    return to_parts


def check_tool_choice(choice: str | dict[str, str], tools: Sequence[Mapping[str, Any]]) -> str | dict[str, str]:
    """Return the tool choice of a ChatRequest if its tools allow it.

    Raises:
        ApiError: the choice requires a tool that the request does not have.
    """
    names = {tool["function"]["name"] for tool in tools}
    if choice == "required" and not names:
        raise ApiError(
            400, "`tool_choice` requires a tool call, but there are no tools", "invalid_value", "tool_choice"
        )
    if not isinstance(choice, str) and choice["name"] not in names:
        message = f"`tool_choice` names `{choice['name']:.80}`, which is not among the tools"
        raise ApiError(400, message, "invalid_value", "tool_choice")
    return choice


def unsupported(subject: str, param: str, hint: str | None = None) -> ApiError:
    """Return the error for a feature of an API that this server does not have; `subject` ends in `is` or `are`."""
    return ApiError(400, f"{subject} not supported" + (f": {hint}" if hint else ""), "unsupported_value", param)

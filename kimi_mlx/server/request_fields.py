"""What the bodies of several APIs have in common: texts and lists of typed parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

from kimi_mlx.server.errors import ApiError

UNSUPPORTED = "foreign"


def type_discriminator(
    known: Collection[str], default: Callable[[Any], str | None] = lambda _: None
) -> Callable[[Any], str]:
    """Return a discriminator for pydantic: the `type` of a part, or UNSUPPORTED if it is none of those known.

    Args:
        known: types that are served.
        default: the type of a part that names none.
    """

    def kind_of(value: Any) -> str:
        kind: Any = (
            cast("dict[str, Any]", value).get("type") if isinstance(value, dict) else getattr(value, "type", None)
        )
        kind = kind or default(value)
        return kind if kind in known else UNSUPPORTED

    return kind_of


def text_shorthand(**part: Any) -> Callable[[Any], Any]:
    """Return a validator for pydantic: a text is short for a list with one part, in which it stands as `text`."""
    return lambda value: [{**part, "text": value}] if isinstance(value, str) else value


def check_tool_choice(choice: str | dict[str, str], tools: Sequence[Mapping[str, Any]]) -> str | dict[str, str]:
    """Return the choice of an ChatRequest, unless there are no tools that it could mean.

    Raises:
        ApiError: there are none.
    """
    names = {tool["function"]["name"] for tool in tools}
    if choice == "required" and not names:
        raise ApiError(400, "a tool must be called, but there are no tools", "invalid_value", "tool_choice")
    if not isinstance(choice, str) and choice["name"] not in names:
        message = f"the tool `{choice['name']:.80}` must be called, but it is not among the tools"
        raise ApiError(400, message, "invalid_value", "tool_choice")
    return choice


def unsupported(what: str, place: str, hint: str | None = None) -> ApiError:
    """The error for what an API has and this server has not; `what` ends in `is` or `are`."""
    return ApiError(400, f"{what} not supported" + (f": {hint}" if hint else ""), "unsupported_value", place)

"""Field types, validators and checks shared by the request bodies of several APIs."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, cast

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from kimi_mlx.server.errors import ApiError
from kimi_mlx.text.messages import ToolCall
from kimi_mlx.text.tool_calls import normalize_arguments

MIN_TOP_P = 1e-6
"""Replaces a `top_p` of 0, which would leave no token."""


def to_integer(value: Any) -> Any:
    """Return a float without a fraction as an integer: many clients write 40 as 40.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_TOKEN_COUNT = 2**31 - 1
"""Largest token count that a body may have; more than any context, so it means no limit."""


def to_token_count(value: Any) -> Any:
    """Return a token count as an integer; -1, which means no limit in other servers, as MAX_TOKEN_COUNT."""
    return MAX_TOKEN_COUNT if value == -1 else to_integer(value)


Item = TypeVar("Item")
ListOf = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is validated up to its first error: a million errors would take seconds."""

Integer = BeforeValidator(to_integer)
"""Annotation of an integer, which may be written as a float."""

TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKEN_COUNT), BeforeValidator(to_token_count)]
AlternativeCount = Annotated[int, Field(ge=0, le=20), Integer]
"""Number of the most likely tokens to report with each token."""

Penalty = Annotated[float, Field(ge=-2, le=2)]
"""Frequency or presence penalty; 0 changes nothing."""

RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
"""vLLM's repetition penalty; 1 changes nothing."""

MinTokens = Annotated[int, Field(ge=0, le=2**31 - 1), Integer]

StopText = Annotated[str, Field(min_length=1)]
Arguments = str | dict[str, Any] | None
"""Arguments of an earlier tool call: JSON text, in some clients an object or nothing."""

MAX_ARGUMENTS_CHARS = 2_000_000
"""Maximum size of the arguments of an earlier call that are decoded: larger ones do not fit the context."""

MAX_LABELS = 16
"""Maximum number of tools that a note names."""

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
        return kind if isinstance(kind, str) and kind in supported else UNSUPPORTED

    return type_of


def text_shorthand(**part: Any) -> Callable[[Any], Any]:
    """Return a validator for pydantic that turns a plain string into a list with one part that has it as `text`."""

    def to_parts(value: Any) -> Any:
        if not isinstance(value, str | list):
            raise PydanticCustomError("string_or_list_type", "must be a string or a list")
        return [{**part, "text": value}] if isinstance(value, str) else value  # pyright: ignore[reportUnknownVariableType]

    return to_parts


def earlier_call(id: str, name: str, arguments: Arguments) -> ToolCall:
    """Return a tool call of the conversation. Its arguments may be blank or encoded twice."""
    text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments or ""
    return ToolCall(id, name, normalize_arguments(text) if len(text) <= MAX_ARGUMENTS_CHARS else text)


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


def name_taken(name: str, place: str, first: str) -> ApiError:
    """Return the error for a tool at `place` whose name the tool at `first` has."""
    message = f"`{place}` has the name `{name:.80}`, as `{first}` has: use different names"
    return ApiError(400, message, "invalid_value", place)


def left_out_note(labels: Iterable[str], reason: str) -> str:
    """Return the note on tools of a request that are left out.

    Args:
        labels: types of the tools, with their names if they have several.
        reason: reason, a sentence without its end.
    """
    unique = list(dict.fromkeys(labels))
    more = [f"{len(unique) - MAX_LABELS} more"] if len(unique) > MAX_LABELS else []
    return f"left out, because {reason}: {', '.join([*unique[:MAX_LABELS], *more])}"


def missing_field(param: str) -> ApiError:
    """Return the error for a required field that a body does not have."""
    return ApiError(400, f"`{param}`: required field is missing", "missing_required_parameter", param)


def placeholder(content_type: str) -> str:
    """Return the text that replaces unsupported content in a tool result: refusing it would break the session."""
    return f"[{content_type:.60}: not supported]"


def unsupported_content(content_type: str, param: str, supported: Collection[str], role: str | None = None) -> ApiError:
    """Return the error for a part of a message that this server cannot pass to the model.

    Args:
        content_type: type of the part.
        param: location of the part.
        supported: supported types.
        role: role of the message, if the type is supported in messages of other roles.
    """
    place = f" in a message of role `{role}`" if role else ""
    subject = f"content of type `{content_type:.60}`{place} is"
    return unsupported(subject, param, f"use {' or '.join(f'`{name}`' for name in supported)}")


def unsupported(subject: str, param: str, hint: str | None = None) -> ApiError:
    """Return the error for a feature of an API that this server does not have; `subject` ends in `is` or `are`."""
    return ApiError(400, f"{subject} not supported" + (f": {hint}" if hint else ""), "unsupported_value", param)

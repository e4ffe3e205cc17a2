"""The grammar that an answer must keep to."""

from __future__ import annotations

from kimi_mlx.server.conversation import Ask, Continuation
from kimi_mlx.server.errors import ApiError


def grammar_for(wish: Ask | Continuation, starts_in_reasoning: bool) -> str | None:
    """The grammar of an answer; None if it is free.

    Args:
        wish: what is asked.
        starts_in_reasoning: the prompt ends inside `<think>`.

    Raises:
        ApiError: what is wrong with a schema, and where.
    """
    if not isinstance(wish, Ask):
        return None
    if wish.response_schema is not None:
        raise ApiError(400, "structured output is not supported yet", "unsupported_value", "response_format")
    if wish.tool_choice not in ("auto", "none"):
        raise ApiError(400, "a tool cannot be forced yet: use `auto`", "unsupported_value", "tool_choice")
    return None

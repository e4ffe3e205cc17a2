"""The grammar that an answer must keep to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kimi_mlx.errors import GrammarError
from kimi_mlx.server.conversation import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.text.grammar import build_grammar, detect_thinking

PLACE = re.compile(r"`([^`]+)`")


def grammar_for(
    ask: ChatRequest, special_tokens: Mapping[str, int], prompt: Sequence[int], calls_before: int
) -> str | None:
    """The grammar of an answer; None if it is free.

    Args:
        ask: what is asked.
        special_tokens: of the tokenizer.
        prompt: that the answer continues.
        calls_before: how many calls the conversation has already.

    Raises:
        ApiError: what is wrong with a schema or tool, and where.
    """
    if ask.partial is not None and ask.response_schema is not None:
        raise ApiError(
            400, "an answer that is begun already cannot be kept to a schema", param=ask.response_schema_name
        )
    try:
        return build_grammar(
            special_tokens,
            detect_thinking(special_tokens, prompt),
            ask.response_schema,
            ask.tools,
            ask.tool_choice,
            ask.parallel_tool_calls,
            calls_before,
            ask.response_schema_name,
        )
    except GrammarError as error:
        place = PLACE.match(error.message)
        message = error.message if error.hint is None else f"{error.message} ({error.hint})"
        raise ApiError(400, message, "invalid_schema", place.group(1) if place else None) from error

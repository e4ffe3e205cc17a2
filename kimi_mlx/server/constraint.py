"""The grammar that an answer must keep to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kimi_mlx.server.conversation import Ask, Continuation
from kimi_mlx.server.errors import ApiError
from kimi_mlx.text.grammar import grammar_of, thinking_after


def grammar_for(wish: Ask | Continuation, special_tokens: Mapping[str, int], prompt: Sequence[int]) -> str | None:
    """The grammar of an answer; None if it is free.

    Args:
        wish: what is asked.
        special_tokens: of the tokenizer.
        prompt: that is answered.

    Raises:
        ApiError: an answer that was begun cannot be kept to a grammar.
        GrammarError: what is wrong with a schema, and where.
    """
    if not isinstance(wish, Ask):
        return None
    grammar = grammar_of(
        special_tokens,
        thinking_after(special_tokens, prompt),
        wish.response_schema,
        wish.tools,
        wish.tool_choice,
        wish.parallel_tool_calls,
        first_index=sum(len(message.tool_calls) for message in wish.messages),
    )
    if grammar is not None and wish.partial is not None:
        raise ApiError(400, "an answer that was begun cannot be kept to a schema or to tools", param="messages")
    return grammar

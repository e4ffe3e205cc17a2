"""The grammars of requests, and the error responses for those that are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kimi_mlx.errors import GrammarError
from kimi_mlx.runtime.answer_grammar import AnswerFormat, AnswerGrammar
from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError

LEADING_NAME = re.compile(r"`([^`]+)`")
"""Location of the error, at the beginning of a GrammarError's message."""

SCHEMA_PATH = re.compile(r"`([^`]+): \$([^`]*)`")
"""Location of a schema, and of the error in it, at the beginning of a GrammarError's message."""


def request_grammar(
    request: ChatRequest, special_tokens: Mapping[str, int], prompt: Sequence[int], num_calls: int
) -> AnswerGrammar:
    """Return the grammar of an answer.

    Args:
        request: chat request.
        special_tokens: special tokens of the tokenizer.
        prompt: prompt of the answer.
        num_calls: number of tool calls in the conversation so far.

    Raises:
        ApiError: 400, a schema or a tool is invalid; `param` is its location.
    """
    if request.partial is not None and (request.response_schema is not None or request.response_rule is not None):
        message = "a partial message cannot be combined with a schema or a grammar for the answer"
        raise ApiError(400, message, param=request.response_schema_name)
    try:
        return request.grammar(special_tokens, prompt, num_calls)
    except GrammarError as error:
        raise schema_error(error) from error


def plain_grammar(answer_format: AnswerFormat) -> AnswerGrammar:
    """Return the grammar of an answer without reasoning and tool calls.

    Raises:
        ApiError: 400, the schema or the rule is invalid; `param` is its location.
    """
    try:
        answer_format.check_schemas()
        return answer_format.grammar({}, (), 0)
    except GrammarError as error:
        raise schema_error(error) from error


def schema_error(error: GrammarError) -> ApiError:
    """Return the error response for a schema or a tool. Its message includes the hint, which is for the client."""
    message = SCHEMA_PATH.sub(r"`\1\2`", error.message, 1) if SCHEMA_PATH.match(error.message) else error.message
    name = LEADING_NAME.match(message)
    message = message if error.hint is None else f"{message} ({error.hint})"
    return ApiError(400, message, "invalid_schema", name.group(1) if name else None)

"""Conversion of chat and completion requests to engine requests: prompt, sampling and grammar."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import GrammarError, UsageError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.api_types import ChatRequest, CompletionRequest, GenerationParams
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.response_builder import ChatReader, PlainReader, TokenReader
from kimi_mlx.server.tool_calls import CallIds, to_kimi_ids
from kimi_mlx.text.grammar import build_grammar, detect_thinking
from kimi_mlx.text.output import THINK_END, opens_reasoning

RESERVED = frozenset(
    {"messages", "tools", "tools_ts_str", "add_generation_prompt", "tokenizer", "self"}
    | {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"}  # functions
)
"""Names of the chat template that `chat_template_kwargs` cannot set."""

LEADING_NAME = re.compile(r"`([^`]+)`")
"""Location of the error, at the beginning of a GrammarError's message."""


@dataclass(frozen=True)
class PreparedRequest:
    """An engine request, and the readers for its tokens.

    Args:
        request: request for the first of several answers.
        new_reader: function that returns a reader for one answer.
    """

    request: Request
    new_reader: Callable[[], TokenReader]


@dataclass(frozen=True)
class PromptBuilder:
    """Prepares requests for the served model.

    Args:
        tokenizer: tokenizer with the chat template.
        context_tokens: size of the context.
        instant_sampling: recommended sampling values, by name of the field, for answers without thinking.
    """

    tokenizer: ChatTokenizer
    context_tokens: int
    instant_sampling: Mapping[str, float]

    def prepare(self, request: ChatRequest | CompletionRequest) -> PreparedRequest:
        """Return the engine request. This takes long for long prompts, so call it in a thread.

        Raises:
            ApiError: the request can never be served.
            KimiMlxError: the template cannot render the messages.
        """
        if isinstance(request, CompletionRequest):
            prompt, grammar = self._plain_prompt(request), None
            new_reader = partial(PlainReader, self.tokenizer.tokenizer)
        else:
            prompt, ids = self._chat_prompt(request)
            new_reader = partial(self._chat_reader, prompt, ids)
            special_tokens = self.tokenizer.tokenizer.special_tokens
            grammar = request_grammar(request, special_tokens, prompt, len(ids.client_ids))
        remaining = self.context_tokens - len(prompt)
        if remaining < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, but the context is {self.context_tokens} tokens",
                "context_length_exceeded",
                "messages" if isinstance(request, ChatRequest) else "prompt",
            )
        for id, _ in request.logit_bias:
            self._check_id(id, "logit_bias")
        engine_request = Request(
            prompt,
            max_tokens=min(remaining, request.max_tokens or self.tokenizer.max_tokens or remaining),
            sampling=self._sampling(request),
            stop_ids=self.tokenizer.stop_ids,
            logit_bias=request.logit_bias,
            top_logprobs=request.top_logprobs,
            grammar=grammar,
        )
        return PreparedRequest(engine_request, new_reader)

    def count_tokens(self, request: ChatRequest) -> int:
        """Return the number of tokens of the prompt, even if it exceeds the context.

        Raises:
            KimiMlxError: the template cannot render the messages.
        """
        return len(self._chat_prompt(request)[0])

    def _chat_prompt(self, request: ChatRequest) -> tuple[tuple[int, ...], CallIds]:
        messages, ids = to_kimi_ids(request.messages, request.call_id_prefix)
        variables: dict[str, Any] = dict(request.template_kwargs)
        if reserved := RESERVED & variables.keys():
            message = f"`{min(reserved)}` is reserved and cannot be set as a variable of the chat template"
            raise ApiError(400, message, param="chat_template_kwargs")
        if request.thinking is not None:
            variables["thinking"] = request.thinking
        tools = None if request.tool_choice == "none" else list(request.tools) or None
        prompt = self.tokenizer.apply_chat_template(messages, tools, **variables)
        if request.partial is not None:
            tokenizer = self.tokenizer.tokenizer
            if opens_reasoning(tokenizer, prompt):  # text of the answer comes after the reasoning
                prompt.append(tokenizer.special_tokens[THINK_END])
            prompt += tokenizer.encode(request.partial)
        return tuple(prompt), ids

    def _chat_reader(self, prompt: Sequence[int], ids: CallIds) -> TokenReader:
        return ChatReader(self.tokenizer.output_parser(prompt), ids.allocator())

    def _check_id(self, id: int, param: str) -> None:
        vocab_size = self.tokenizer.tokenizer.vocab_size
        if not 0 <= id < vocab_size:
            raise ApiError(400, f"token {id} is outside the vocabulary of {vocab_size} tokens", param=param)

    def _plain_prompt(self, request: CompletionRequest) -> tuple[int, ...]:
        if isinstance(request.prompt, str):
            ids = self.tokenizer.encode(request.prompt)
            bos = self.tokenizer.tokenizer.special_tokens.get("[BOS]")
            return tuple(ids) if ids or bos is None else (bos,)
        for id in request.prompt:
            self._check_id(id, "prompt")
        if not request.prompt:
            raise ApiError(400, "the prompt has no tokens", param="prompt")
        return request.prompt

    def _sampling(self, request: GenerationParams) -> Sampling:
        is_instant = isinstance(request, ChatRequest) and request.thinking is False
        recommended = dict(self.instant_sampling) if is_instant else {}
        requested = {name: value for name, value in request.sampling.items() if value is not None}
        try:
            return replace(self.tokenizer.sampling, **{**recommended, **requested})
        except UsageError as error:
            raise ApiError(400, error.message) from error


def request_grammar(
    request: ChatRequest, special_tokens: Mapping[str, int], prompt: Sequence[int], num_calls: int
) -> str | None:
    """Return the grammar of an answer, or None if the answer is unconstrained.

    Args:
        request: chat request.
        special_tokens: special tokens of the tokenizer.
        prompt: prompt of the answer.
        num_calls: number of tool calls in the conversation so far.

    Raises:
        ApiError: 400, a schema or a tool is invalid; `param` is its location.
    """
    if request.partial is not None and request.response_schema is not None:
        message = "a partial message cannot be combined with a schema for the answer"
        raise ApiError(400, message, param=request.response_schema_name)
    try:
        return build_grammar(
            special_tokens,
            detect_thinking(special_tokens, prompt),
            request.response_schema,
            request.tools,
            request.tool_choice,
            request.parallel_tool_calls,
            num_calls,
            request.response_schema_name,
        )
    except GrammarError as error:
        name = LEADING_NAME.match(error.message)
        message = error.message if error.hint is None else f"{error.message} ({error.hint})"
        raise ApiError(400, message, "invalid_schema", name.group(1) if name else None) from error


def request_for_choice(request: Request, index: int) -> Request:
    """Return the request for one of several answers, with a seed of its own."""
    seed = request.sampling.seed
    if seed is None or index == 0:
        return request
    return replace(request, sampling=replace(request.sampling, seed=(seed + index) % 2**63))

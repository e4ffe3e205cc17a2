"""From what is asked to the engine's request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import UsageError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.constraint import grammar_for
from kimi_mlx.server.conversation import ChatRequest, CompletionRequest, GenerationParams
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.response_builder import ChatReader, PlainReader, TokenReader
from kimi_mlx.server.tool_calls import CallIds, to_kimi_ids
from kimi_mlx.text.output import THINK_END, starts_in_reasoning

RESERVED = frozenset(
    {"messages", "tools", "tools_ts_str", "add_generation_prompt", "tokenizer", "self"}
    | {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"}  # its functions
)
"""Variables of the template that are none of a request's options."""


@dataclass(frozen=True)
class PreparedRequest:
    """What to ask the engine, and how to read its answer.

    Args:
        request: for the first of several answers.
        reader: makes what reads one answer.
    """

    request: Request
    reader: Callable[[], TokenReader]


@dataclass(frozen=True)
class PromptBuilder:
    """The model that is served, as far as prompts go.

    Args:
        tokenizer: its text side.
        context_tokens: how many tokens it holds.
        instant_sampling: values of Sampling, by name, that are recommended where it does not think.
    """

    tokenizer: ChatTokenizer
    context_tokens: int
    instant_sampling: Mapping[str, float]

    def prepare(self, wish: ChatRequest | CompletionRequest) -> PreparedRequest:
        """What to ask the engine; takes long for long prompts.

        Raises:
            ApiError: it can never be served.
            KimiMlxError: the messages make no prompt.
        """
        if isinstance(wish, CompletionRequest):
            prompt, read, grammar = self._text(wish), partial(PlainReader, self.tokenizer.tokenizer), None
        else:
            prompt, ids = self._conversation(wish)
            read = partial(self._chat_reader, prompt, ids)
            grammar = grammar_for(wish, self.tokenizer.tokenizer.special_tokens, prompt, len(ids.known))
        left = self.context_tokens - len(prompt)
        if left < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, the context holds {self.context_tokens}",
                "context_length_exceeded",
                "messages" if isinstance(wish, ChatRequest) else "prompt",
            )
        for id, _ in wish.logit_bias:
            self._check_id(id, "logit_bias")
        request = Request(
            prompt,
            max_tokens=min(left, wish.max_tokens or self.tokenizer.max_tokens or left),
            sampling=self._sampling(wish),
            stop_ids=self.tokenizer.stop_ids,
            logit_bias=wish.logit_bias,
            top_logprobs=wish.top_logprobs,
            grammar=grammar,
        )
        return PreparedRequest(request, read)

    def count(self, ask: ChatRequest) -> int:
        """How many tokens its prompt has, more than the context holds or not.

        Raises:
            KimiMlxError: the messages make no prompt.
        """
        return len(self._conversation(ask)[0])

    def _conversation(self, ask: ChatRequest) -> tuple[tuple[int, ...], CallIds]:
        messages, ids = to_kimi_ids(ask.messages, ask.call_id_prefix)
        options: dict[str, Any] = dict(ask.template_kwargs)
        if taken := RESERVED & options.keys():
            raise ApiError(400, f"`{min(taken)}` is no option of the chat template", param="chat_template_kwargs")
        if ask.thinking is not None:
            options["thinking"] = ask.thinking
        tools = None if ask.tool_choice == "none" else list(ask.tools) or None
        prompt = self.tokenizer.apply_chat_template(messages, tools, **options)
        if ask.partial is not None:
            tokenizer = self.tokenizer.tokenizer
            if starts_in_reasoning(tokenizer, prompt):  # it has been thought before the first word was said
                prompt.append(tokenizer.special_tokens[THINK_END])
            prompt += tokenizer.encode(ask.partial)
        return tuple(prompt), ids

    def _chat_reader(self, prompt: Sequence[int], ids: CallIds) -> TokenReader:
        return ChatReader(self.tokenizer.output_parser(prompt), ids.allocator())

    def _check_id(self, id: int, param: str) -> None:
        vocabulary = self.tokenizer.tokenizer.vocab_size
        if not 0 <= id < vocabulary:
            raise ApiError(400, f"token {id} is outside the vocabulary of {vocabulary}", param=param)

    def _text(self, wish: CompletionRequest) -> tuple[int, ...]:
        if isinstance(wish.prompt, str):
            ids = self.tokenizer.encode(wish.prompt)
            bos = self.tokenizer.tokenizer.special_tokens.get("[BOS]")
            return tuple(ids) if ids or bos is None else (bos,)
        for id in wish.prompt:
            self._check_id(id, "prompt")
        if not wish.prompt:
            raise ApiError(400, "the prompt has no tokens", param="prompt")
        return wish.prompt

    def _sampling(self, wish: GenerationParams) -> Sampling:
        is_instant = isinstance(wish, ChatRequest) and wish.thinking is False
        recommended = dict(self.instant_sampling) if is_instant else {}
        asked = {name: value for name, value in wish.sampling.items() if value is not None}
        try:
            return replace(self.tokenizer.sampling, **{**recommended, **asked})
        except UsageError as error:
            raise ApiError(400, error.message) from error


def request_for_choice(request: Request, index: int) -> Request:
    """The request for one of several answers: each is drawn with random numbers of its own."""
    seed = request.sampling.seed
    if seed is None or index == 0:
        return request
    return replace(request, sampling=replace(request.sampling, seed=(seed + index) % 2**63))

"""Conversion of chat and completion requests to engine requests: prompt, sampling and grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kimi_mlx.engine.request import ImageInput, Request, Sampling
from kimi_mlx.errors import CallIdError, GrammarError, ImageError, TextError, UsageError
from kimi_mlx.runtime.answer_grammar import AnswerGrammar
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.prompt import Prompt
from kimi_mlx.server.api_types import ChatRequest, CompletionRequest, GenerationParams
from kimi_mlx.server.errors import ApiError, PromptTooLongError
from kimi_mlx.server.media import image_error, resolve_media
from kimi_mlx.server.message_content import texts_of
from kimi_mlx.server.request_grammar import plain_grammar, request_grammar, schema_error
from kimi_mlx.server.response_builder import ChatReader, PlainReader, StopTokenReader, TokenReader
from kimi_mlx.server.template_variables import template_variables
from kimi_mlx.text.call_ids import CallIds, to_kimi_ids
from kimi_mlx.text.messages import Message
from kimi_mlx.text.output import THINK_END, OutputParser, opens_reasoning
from kimi_mlx.text.tokenizer import MAX_ENCODE_CHARS, Tokenizer
from kimi_mlx.text.tool_calls import names_of

RESERVED = frozenset(
    {"messages", "tools", "tools_ts_str", "add_generation_prompt", "tokenizer", "self"}
    | {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"}  # functions
)
"""Names of the chat template that `chat_template_kwargs` cannot set."""

USUAL_CHARS_PER_TOKEN = 8
"""Texts with more characters than this per token of the context rarely fit."""

MAX_COUNTED_TOKENS = 1_000_000
"""Maximum number of tokens of a prompt that are counted, if the context is not larger."""

CUT_TOKENS = 16
"""Upper estimate of the additional tokens of a part that come from cutting the text."""

MESSAGE_TOKENS = 3
"""Minimum number of tokens of a message: the markers of its role, of its text and of its end."""

CALL_TOKENS = 6
"""Minimum number of tokens of a tool call: three markers, and the parts of its id."""

MANY_MESSAGES = 1_000
"""An error of the template mentions the number of messages from this many on."""

ASSISTANT_BEGIN, HEADER_END = "<|im_assistant|>", "<|im_middle|>"
"""Control tokens around the name of the assistant, in Kimi's templates."""


@dataclass(frozen=True)
class PreparedRequest:
    """A request for the engine, with all that is needed to read its answers. It can be pickled.

    Args:
        request: request for the first of several answers.
        n: number of answers.
        stop: texts that end an answer.
        call_ids: tool call ids of the conversation; None if the answer is plain text.
        tool_names: names of the tools that the model may call.
        free_text_tools: names of those tools whose arguments are any text instead of JSON.
        return_progress: whether the events of the answers include ProgressEvents.
        place: location of the prompt in the body, for error messages.
        stop_token_ids: tokens of the request that end an answer and are not part of it.
        notes: sentences about parts of the request that have no effect, for the response.
    """

    request: Request
    n: int
    stop: tuple[str, ...]
    call_ids: CallIds | None = None
    tool_names: tuple[str, ...] = ()
    free_text_tools: tuple[str, ...] = ()
    return_progress: bool = False
    place: str = "messages"
    stop_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def new_reader(self, tokenizer: Tokenizer) -> TokenReader:
        """Return a reader for the tokens of one answer."""
        reader: TokenReader = PlainReader(tokenizer)
        if self.call_ids is not None:
            starts_in_reasoning = opens_reasoning(tokenizer, self.request.prompt)
            parser = OutputParser(tokenizer, starts_in_reasoning, self.tool_names, self.free_text_tools)
            reader = ChatReader(parser, self.call_ids.allocator())
        return StopTokenReader(reader, self.stop_token_ids) if self.stop_token_ids else reader


@dataclass(frozen=True)
class PromptBuilder:
    """Prepares requests for the served model. When it is pickled, the other process loads the tokenizer again.

    Args:
        tokenizer: tokenizer with the chat template.
        context_tokens: size of the context.
        instant_sampling: recommended sampling values, by name of the field, for answers without thinking.
        text_only_reason: reason why the model sees no images, for the log; None if it does.
        constrains_arguments: whether the schemas of tools are enforced in the arguments of calls.
        fetched: contents of the URLs of images that have been fetched.
    """

    tokenizer: ChatTokenizer
    context_tokens: int
    instant_sampling: Mapping[str, float]
    text_only_reason: str | None = None
    constrains_arguments: bool = True
    fetched: Mapping[str, bytes] = field(default_factory=dict[str, bytes], repr=False)

    def __reduce__(self) -> tuple[Callable[..., PromptBuilder], tuple[Any, ...]]:
        """Pickle the builder as the folder of its tokenizer, and the values that may differ from the folder's."""
        tokenizer = self.tokenizer
        sampling = tuple(self.instant_sampling.items())
        values = (self.context_tokens, sampling, self.text_only_reason, self.constrains_arguments)
        return _restore_builder, ((tokenizer.folder, tokenizer.sampling, tokenizer.max_tokens, *values), self.fetched)

    def prepare(self, request: ChatRequest | CompletionRequest) -> PreparedRequest:
        """Return the engine request. This takes long for long prompts, so call it in a thread.

        Raises:
            ApiError: the request can never be served.
            MissingMediaError: URLs of images must be fetched first.
            KimiMlxError: the template cannot render the messages.
        """
        if isinstance(request, ChatRequest):
            request = self._resolve_media(request)
        self._check_size(request, self.context_tokens)
        images: tuple[ImageInput, ...] = ()
        if isinstance(request, ChatRequest):
            chat_prompt, ids = self._chat_prompt(request)
            prompt, images = tuple(chat_prompt.ids), chat_prompt.images
        else:
            prompt, ids = self._plain_prompt(request), None
        remaining = self.context_tokens - len(prompt)
        limit = self.tokenizer.max_tokens if request.max_tokens is None else request.max_tokens
        if remaining < (0 if limit == 0 else 1):
            raise self._too_long(request, len(prompt), is_exact=True)
        grammar, tool_names, free_text_tools = AnswerGrammar(None), (), ()
        if isinstance(request, ChatRequest) and ids is not None:
            special_tokens = self.tokenizer.tokenizer.special_tokens
            request = replace(request, constrains_arguments=self.constrains_arguments)
            grammar = request_grammar(request, special_tokens, prompt, len(ids.client_ids))
            tool_names, free_text_tools = names_of(request.tools), tuple(request.input_rules)
        elif isinstance(request, CompletionRequest) and request.answer_format is not None:
            grammar = plain_grammar(request.answer_format)
        self.check_ids(request.stop_token_ids, "stop_token_ids")
        if request.max_tokens is not None and request.min_tokens > request.max_tokens:
            limits = f"`min_tokens` is {request.min_tokens}, but must be at most `max_tokens`, {request.max_tokens}"
            raise ApiError(400, limits, "invalid_value", "min_tokens")
        for id, _ in request.logit_bias:
            self._check_id(id, f"logit_bias.{id}")
        engine_request = Request(
            prompt,
            max_tokens=remaining if limit is None else min(remaining, limit),
            sampling=self._sampling(request),
            stop_ids=self.tokenizer.stop_ids.union(request.stop_token_ids),
            logit_bias=request.logit_bias,
            top_logprobs=request.top_logprobs,
            grammar=grammar.rules,
            images=images,
            min_tokens=request.min_tokens,
            prompt_logprobs=request.prompt_logprobs if isinstance(request, CompletionRequest) else None,
        )
        return PreparedRequest(
            engine_request,
            request.n,
            request.stop,
            ids,
            tool_names,
            free_text_tools,
            request.return_progress,
            _place(request),
            request.stop_token_ids,
            (*request.notes, *grammar.notes),
        )

    def count_tokens(self, request: ChatRequest) -> int:
        """Return the number of tokens of the prompt, even if it exceeds the context.

        Raises:
            ApiError: the prompt has more than MAX_COUNTED_TOKENS tokens, or the request can never be served.
            KimiMlxError: the template cannot render the messages.
        """
        return len(self.chat_ids(request))

    def chat_ids(self, request: ChatRequest, *, add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of the prompt, even if it exceeds the context.

        Args:
            request: conversation.
            add_generation_prompt: whether the prompt ends with the beginning of the answer.

        Raises:
            ApiError: the prompt has more than MAX_COUNTED_TOKENS tokens, or the request can never be served.
            KimiMlxError: the template cannot render the messages.
        """
        request = self._resolve_media(request)
        self._check_size(request, max(self.context_tokens, MAX_COUNTED_TOKENS))
        template_kwargs = {} if add_generation_prompt else {"add_generation_prompt": False}
        return self._chat_prompt(request, template_kwargs)[0].ids

    def text_ids(self, text: str, place: str) -> list[int]:
        """Return the token ids of plain text.

        Args:
            text: the text.
            place: location of the text in the body, for error messages.

        Raises:
            ApiError: the model has no tokenizer.
        """
        if not self.tokenizer.has_tokenizer:
            message = "this model has no tokenizer, so it cannot read text; send token ids as `prompt`"
            raise ApiError(400, message, "invalid_value", place)
        return self.tokenizer.encode(text)

    def check_ids(self, ids: Sequence[int], place: str) -> None:
        """Check that token ids are in the vocabulary.

        Args:
            ids: token ids.
            place: their location in the body.

        Raises:
            ApiError: one is not.
        """
        for index, id in enumerate(ids):
            self._check_id(id, f"{place}[{index}]")

    def _resolve_media(self, request: ChatRequest) -> ChatRequest:
        return resolve_media(request, self.text_only_reason, self.fetched)

    def _chat_prompt(
        self, request: ChatRequest, template_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Prompt, CallIds]:
        """Return the prompt, and the ids of its tool calls.

        Args:
            request: conversation.
            template_kwargs: variables of the template that requests cannot set.
        """
        try:
            request.check_schemas()
            messages, ids = to_kimi_ids(request.messages, request.call_id_prefix, request.places)
        except GrammarError as error:
            raise schema_error(error) from error
        except CallIdError as error:
            raise ApiError(400, error.message, "invalid_tool_call_id", error.place) from error
        if reserved := RESERVED & request.template_kwargs.keys():
            message = f"`{min(reserved)}` is reserved and cannot be set as a variable of the chat template"
            raise ApiError(400, message, param="chat_template_kwargs")
        variables = template_variables(request, self.tokenizer.template) | dict(template_kwargs or {})
        prompt = self._render(request, messages, variables)
        if request.partial is not None:
            self._begin_answer(prompt, request)
        return prompt, ids

    def _begin_answer(self, prompt: Prompt, request: ChatRequest) -> None:
        """Append the beginning of the answer, which a client has sent, to a prompt that ends where answers begin."""
        tokenizer = self.tokenizer.tokenizer
        if request.partial_name:
            _set_last_name(prompt.ids, tokenizer.special_tokens, tokenizer.encode(request.partial_name))
        if opens_reasoning(tokenizer, prompt.ids):  # text of the answer comes after the reasoning
            prompt.ids.extend(tokenizer.encode(request.partial_reasoning))
            prompt.ids.append(tokenizer.special_tokens[THINK_END])
        prompt.ids.extend(tokenizer.encode(request.partial or ""))

    def _render(
        self,
        request: ChatRequest,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
    ) -> Prompt:
        """Return the prompt of the messages of a request, which have Kimi's tool call ids."""
        try:
            return self.tokenizer.prompt(messages, request.prompt_tools, **variables)
        except ImageError as error:
            raise image_error(request, error) from error
        except TextError as error:
            param = request.messages_name
            if not self.tokenizer.has_chat_template:
                message = "this model has no chat template, so it cannot answer messages; use /v1/completions"
            else:  # the client does not need to know the server's folders
                message = error.message.replace(f"{self.tokenizer.folder}/", "")
            if len(messages) >= MANY_MESSAGES:
                message = f"`{param}` has {len(messages)} messages: {message}"
            raise ApiError(400, message, "invalid_value", param, hint=error.hint) from error

    def _check_size(self, request: ChatRequest | CompletionRequest, max_tokens: int) -> None:
        """Refuse a prompt that must have more tokens, before it is rendered and all of it is tokenized."""
        if isinstance(request, CompletionRequest) and not isinstance(request.prompt, str):
            min_tokens = len(request.prompt)
        elif isinstance(request, CompletionRequest):
            min_tokens = self._min_tokens([str(request.prompt)], max_tokens)
        else:
            num_calls = sum(len(message.tool_calls) for message in request.messages)
            min_tokens = MESSAGE_TOKENS * len(request.messages) + CALL_TOKENS * num_calls
            if min_tokens <= max_tokens:
                min_tokens += self._min_tokens(self._texts(request, max_tokens), max_tokens)
        if min_tokens > max_tokens:
            raise self._too_long(request, min_tokens, is_exact=False)

    def _texts(self, request: ChatRequest, max_tokens: int) -> list[str]:
        """Return the texts of a conversation that its prompt contains; others only if they could never fit."""
        calls = [call for message in request.messages for call in message.tool_calls]
        texts = [text for message in request.messages for text in texts_of(message.content)]
        texts += [call.arguments for call in calls]
        texts += [request.partial_reasoning, request.partial or ""]
        others = [text for message in request.messages for text in (message.reasoning_content, message.name) if text]
        others += [call.name for call in calls]
        return texts + [text for text in others if len(text) > USUAL_CHARS_PER_TOKEN * max_tokens]

    def _min_tokens(self, texts: Sequence[str], max_tokens: int) -> int:
        """Return a lower bound of the number of tokens of the texts. Counting stops once it exceeds `max_tokens`.

        The first bound is the number of characters divided by the length of the longest token. If long texts could
        still fit, they are tokenized in parts, which are those of the tokenizer.
        """
        num_chars = sum(map(len, texts))
        min_tokens = num_chars // self.tokenizer.tokenizer.max_token_bytes
        if num_chars <= USUAL_CHARS_PER_TOKEN * max_tokens or not self.tokenizer.has_tokenizer:
            return min_tokens
        num_tokens = 0
        for text in texts:
            for at in range(0, len(text), MAX_ENCODE_CHARS):
                if max(min_tokens, num_tokens) > max_tokens:
                    return max(min_tokens, num_tokens)
                num_tokens += max(len(self.tokenizer.encode(text[at : at + MAX_ENCODE_CHARS])) - CUT_TOKENS, 0)
        return max(min_tokens, num_tokens)

    def _too_long(self, request: ChatRequest | CompletionRequest, num_tokens: int, *, is_exact: bool) -> ApiError:
        return PromptTooLongError(num_tokens, self.context_tokens, _place(request), is_exact)

    def _check_id(self, id: int, param: str) -> None:
        vocab_size = self.tokenizer.tokenizer.vocab_size
        if not 0 <= id < vocab_size:
            message = f"`{param}`: token {id} is outside the vocabulary of {vocab_size} tokens"
            raise ApiError(400, message, param=param)

    def _plain_prompt(self, request: CompletionRequest) -> tuple[int, ...]:
        if isinstance(request.prompt, str):
            ids = self.text_ids(request.prompt, request.place)
            bos = self.tokenizer.tokenizer.special_tokens.get("[BOS]")
            return tuple(ids) if ids or bos is None else (bos,)
        self.check_ids(request.prompt, request.place)
        if not request.prompt:
            raise ApiError(400, "the prompt has no tokens", param=request.place)
        return request.prompt

    def _sampling(self, request: GenerationParams) -> Sampling:
        is_instant = isinstance(request, ChatRequest) and request.thinking is False
        recommended = dict(self.instant_sampling) if is_instant else {}
        requested = {name: value for name, value in request.sampling.items() if value is not None}
        try:
            return replace(self.tokenizer.sampling, **{**recommended, **requested})
        except UsageError as error:
            raise ApiError(400, error.message, "invalid_value", hint=error.hint) from error


def _place(request: ChatRequest | CompletionRequest) -> str:
    """Return the location of the prompt in the body."""
    return request.messages_name if isinstance(request, ChatRequest) else request.place


def _set_last_name(ids: list[int], special_tokens: Mapping[str, int], name: Sequence[int]) -> None:
    """Replace the name in the header of the last message of a prompt, `<|im_assistant|>NAME<|im_middle|>`."""
    begin, end = special_tokens.get(ASSISTANT_BEGIN), special_tokens.get(HEADER_END)
    if begin in ids and end in ids:
        last = len(ids) - 1
        ids[last - ids[::-1].index(begin) + 1 : last - ids[::-1].index(end)] = name


def _restore_builder(values: tuple[Any, ...], fetched: Mapping[str, bytes]) -> PromptBuilder:
    return replace(_load_builder(*values), fetched=fetched)


@lru_cache(maxsize=1)
def _load_builder(
    folder: Path,
    sampling: Sampling,
    max_tokens: int | None,
    context_tokens: int,
    instant_sampling: tuple[tuple[str, float], ...],
    text_only_reason: str | None,
    constrains_arguments: bool,
) -> PromptBuilder:
    """Load a pickled builder in another process. The last one is cached, so each process loads it once."""
    tokenizer = replace(ChatTokenizer.load(folder), sampling=sampling, max_tokens=max_tokens)
    return PromptBuilder(tokenizer, context_tokens, dict(instant_sampling), text_only_reason, constrains_arguments)


def request_for_choice(request: Request, index: int, client: str = "") -> Request:
    """Return the request for one of several answers, with a seed of its own.

    Args:
        request: request for the first answer.
        index: index of the answer.
        client: client that sent it.
    """
    sampling = request.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + index) % 2**63)
    return replace(request, sampling=sampling, client=client)

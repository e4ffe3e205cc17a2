"""POST /v1/completions: continuation of plain text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from kimi_mlx.runtime.answer_grammar import AnswerFormat
from kimi_mlx.server.api_types import (
    AnswerEvent,
    CompleteAnswer,
    CompletionRequest,
    DeltaEvent,
    FinishEvent,
    PromptEvent,
    TokenLogprobs,
    total_usage,
)
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.sse import StreamEvent
from kimi_mlx.server.openai.chat_request import GenerationBody
from kimi_mlx.server.openai.response_fields import DONE, MIN_LOGPROB, openai_error, usage_dict
from kimi_mlx.server.request_fields import (
    MAX_TOKEN_COUNT,
    AlternativeCount,
    Integer,
    ListOf,
    to_integer,
    to_token_count,
)

MAX_PROMPTS = 64

MAX_TOKEN_ID = 2**31 - 1

Id = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
CompletionTokenCount = Annotated[int, Field(ge=0, le=MAX_TOKEN_COUNT), BeforeValidator(to_token_count)]
Ids = Annotated[ListOf[Id], Field(min_length=1)]
Prompts = Annotated[ListOf[str], Field(min_length=1, max_length=MAX_PROMPTS)]
IdPrompts = Annotated[ListOf[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]


def _check_prompts(value: Any) -> Any:
    """Check the kind and the number of prompts before the prompts themselves; convert token ids that are floats."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", "must be a string or a list")
    items = cast("list[Any]", value)
    if items and isinstance(items[0], int | float):
        return [to_integer(id) for id in items]
    if not items or len(items) > MAX_PROMPTS:
        counts = {"count": len(items), "maximum": MAX_PROMPTS}
        raise PydanticCustomError("prompt_count", "has {count} items, but 1 to {maximum} are allowed", counts)
    return [[to_integer(id) for id in cast("list[Any]", item)] if isinstance(item, list) else item for item in items]


class CompletionBody(GenerationBody):
    """The body of a plain completion."""

    prompt: Annotated[str | Ids | Prompts | IdPrompts, BeforeValidator(_check_prompts)]
    echo: bool | None = None
    logprobs: AlternativeCount | None = Field(
        None, description="Number of most likely tokens to report with each token; with `echo`, also of the prompt."
    )
    max_tokens: CompletionTokenCount | None = Field(
        None, description="0 returns only the prompt; -1 allows the rest of the context."
    )
    suffix: str | None = Field(None, description="Not supported.")
    best_of: Annotated[int, Field(ge=1, le=20), Integer] | None = Field(
        None, description="Only the value of `n` is supported."
    )

    def to_completion_requests(self) -> list[CompletionRequest]:
        """Return one request for each prompt.

        Raises:
            ApiError: the body uses a feature that is not supported.
        """
        if self.suffix:
            raise ApiError(400, "`suffix` is not supported: leave it out", "unsupported_parameter", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "`best_of` is not supported: leave it out", "unsupported_parameter", "best_of")
        params = self.generation_params()
        params["top_logprobs"] = self.logprobs
        constraint = self.answer_constraint()
        answer_format = constraint and AnswerFormat(
            response_schema=constraint.schema, response_rule=constraint.rule, response_schema_name=constraint.name
        )
        return [
            CompletionRequest(
                **params,
                prompt=prompt,
                place=place,
                answer_format=answer_format,
                prompt_logprobs=self.logprobs if self.echo else None,
            )
            for place, prompt in self._prompts()
        ]

    def _prompts(self) -> list[tuple[str, str | tuple[int, ...]]]:
        """Return the prompts with their places in the body."""
        if isinstance(self.prompt, str):
            return [("prompt", self.prompt)]
        if isinstance(self.prompt[0], int):
            return [("prompt", tuple(id for id in self.prompt if isinstance(id, int)))]
        prompts = [prompt for prompt in self.prompt if not isinstance(prompt, int)]
        return [
            (f"prompt[{index}]", prompt if isinstance(prompt, str) else tuple(prompt))
            for index, prompt in enumerate(prompts)
        ]


class CompletionFormatter:
    """Formats the answers to one request, numbered consecutively over its prompts; an `ApiFormatter`.

    Args:
        id: id of the response.
        model: name of the model.
        created: creation time, as a Unix time in seconds.
        echoes: text to put before each answer: its prompt, or an empty string.
        include_usage: whether a stream ends with the token counts.
        has_prompt_logprobs: whether the prompts are echoed with log probabilities.
    """

    def __init__(
        self,
        id: str,
        model: str,
        created: int,
        echoes: Sequence[str],
        *,
        include_usage: bool,
        has_prompt_logprobs: bool = False,
    ):
        self._head: dict[str, Any] = {"id": id, "object": "text_completion", "created": created, "model": model}
        self._echoes, self._include_usage = echoes, include_usage
        self._has_prompt_logprobs = has_prompt_logprobs
        self.notes: Sequence[str] = ()
        self._finishes: list[FinishEvent] = []
        self._offsets = [TextOffsets(len(echo)) for echo in echoes]

    def begin(self) -> Iterator[StreamEvent]:
        """Yield the prompts, if they are echoed without log probabilities."""
        for index, echo in enumerate([] if self._has_prompt_logprobs else self._echoes):
            if echo:
                yield self._chunk(index, echo)

    def add(self, event: AnswerEvent) -> Iterator[StreamEvent]:
        """Yield the chunk of an event."""
        if isinstance(event, PromptEvent):
            yield self._chunk(event.index, self._echoes[event.index], self._prompt_logprobs(event))
        elif isinstance(event, DeltaEvent):
            yield self._chunk(event.index, event.delta.text, self._logprobs(event.index, event.logprobs))
        elif isinstance(event, FinishEvent):
            self._finishes.append(event)
            yield self._chunk(event.index, "", finish_reason=event.reason)

    def end(self) -> Iterator[StreamEvent]:
        """Yield the token counts, if requested, and the end marker."""
        if self._include_usage:
            usage = usage_dict(total_usage(self._finishes))
            yield StreamEvent.from_json(self._head | {"choices": [], "usage": usage})
        yield DONE

    def fail(self, error: ApiError) -> Iterable[StreamEvent]:
        """Return the error as a chunk, and the end marker."""
        return (StreamEvent.from_json(openai_error(error)), DONE)

    def full_response(self, answers: Sequence[CompleteAnswer]) -> dict[str, Any]:
        """Return the completion object."""
        choices = [
            {
                "index": answer.finish.index,
                "text": self._echoes[answer.finish.index] + answer.delta.text,
                "logprobs": self._all_logprobs(answer),
                "finish_reason": answer.finish.reason,
            }
            for answer in answers
        ]
        usage = usage_dict(total_usage(answer.finish for answer in answers))
        return self._head | {"choices": choices, "usage": usage}

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> StreamEvent:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return StreamEvent.from_json(self._head | {"choices": [choice]} | usage)

    def _all_logprobs(self, answer: CompleteAnswer) -> dict[str, Any] | None:
        """Return log probabilities of the prompt, if requested, and of the answer."""
        parts = [self._prompt_logprobs(answer.prompt)] if answer.prompt is not None else []
        new = self._logprobs(answer.finish.index, answer.logprobs)
        parts += [new] if new is not None else []
        return {name: [item for part in parts for item in part[name]] for name in parts[0]} if parts else None

    def _prompt_logprobs(self, event: PromptEvent) -> dict[str, Any]:
        """Return log probabilities of a prompt. The first token has none."""
        tokens = [event.first, *(token.token for token in event.logprobs)]
        return {
            "tokens": list(map(token_text, tokens)),
            "token_logprobs": [None, *(max(token.logprob, MIN_LOGPROB) for token in event.logprobs)],
            "top_logprobs": [None, *map(_top, event.logprobs)],
            "text_offset": TextOffsets(end=len(self._echoes[event.index])).of(tokens),
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """Return log probabilities of an answer in the format of this API: parallel lists."""
        if not tokens:
            return None
        return {
            "tokens": [token_text(token.token) for token in tokens],
            "token_logprobs": [max(token.logprob, MIN_LOGPROB) for token in tokens],
            "top_logprobs": list(map(_top, tokens)),
            "text_offset": self._offsets[index].of([token.token for token in tokens]),
        }


class TextOffsets:
    """Computes the positions of tokens in their text, in characters; a token may be a part of a character.

    Args:
        start: position of the first token.
        end: largest position, if the text is known.
    """

    def __init__(self, start: int = 0, end: int | None = None):
        self._next, self._end = start, end
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, tokens: Iterable[bytes]) -> list[int]:
        """Return the positions of the next tokens."""
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._next if self._end is None else min(self._next, self._end))
            self._next += len(self._decoder.decode(token))
        return offsets


def token_text(token: bytes) -> str:
    """Return the text of a token; as OpenAI writes it, such as `bytes:\\xe2\\x80`, if it is a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _top(token: TokenLogprobs) -> dict[str, float]:
    """Return the most likely tokens; the token itself is always one of them."""
    found: dict[str, float] = {}
    for top, logprob in (*token.top, (token.token, token.logprob)):
        found.setdefault(token_text(top), max(logprob, MIN_LOGPROB))
    return found

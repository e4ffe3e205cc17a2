"""POST /v1/completions: continuation of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from kimi_mlx.server.api_types import (
    AnswerEvent,
    CompleteAnswer,
    CompletionRequest,
    DeltaEvent,
    FinishEvent,
    TokenLogprobs,
    total_usage,
)
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.sse import StreamEvent
from kimi_mlx.server.openai.chat_request import GenerationBody
from kimi_mlx.server.openai.response_fields import DONE, MIN_LOGPROB, openai_error, usage_dict
from kimi_mlx.server.request_fields import Integer, ListOf, to_integer

MAX_LOGPROBS = 5
MAX_PROMPTS = 64

Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
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
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Integer] | None = None
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
        if self.echo and self.logprobs is not None:
            message = "`logprobs` of the prompt are not supported: leave out `echo` or `logprobs`"
            raise ApiError(400, message, "unsupported_parameter", "logprobs")
        params = self.generation_params()
        params["top_logprobs"] = self.logprobs
        return [CompletionRequest(**params, prompt=prompt, place=place) for place, prompt in self._prompts()]

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
    """

    def __init__(self, id: str, model: str, created: int, echoes: Sequence[str], *, include_usage: bool):
        self._head: dict[str, Any] = {"id": id, "object": "text_completion", "created": created, "model": model}
        self._echoes, self._include_usage = echoes, include_usage
        self._finishes: list[FinishEvent] = []
        self._lengths = [len(echo) for echo in echoes]

    def begin(self) -> Iterator[StreamEvent]:
        """Yield the prompts, if they are echoed."""
        for index, echo in enumerate(self._echoes):
            if echo:
                yield self._chunk(index, echo)

    def add(self, event: AnswerEvent) -> Iterator[StreamEvent]:
        """Yield the chunk of an event."""
        if isinstance(event, DeltaEvent):
            yield self._chunk(event.index, event.delta.text, event.logprobs)
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
                "logprobs": self._logprobs(answer.finish.index, answer.logprobs),
                "finish_reason": answer.finish.reason,
            }
            for answer in answers
        ]
        usage = usage_dict(total_usage(answer.finish for answer in answers))
        return self._head | {"choices": choices, "usage": usage}

    def _chunk(
        self, index: int, text: str, logprobs: Sequence[TokenLogprobs] = (), finish_reason: str | None = None
    ) -> StreamEvent:
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logprobs),
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._include_usage else {}
        return StreamEvent.from_json(self._head | {"choices": [choice]} | usage)

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """Return log probabilities in the format of this API: parallel lists."""
        if not tokens:
            return None
        texts = [token.token.decode(errors="replace") for token in tokens]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, MIN_LOGPROB) for token in tokens],
            "top_logprobs": [
                {top.decode(errors="replace"): max(logprob, MIN_LOGPROB) for top, logprob in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }

"""POST /v1/completions: plain text to be continued."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from kimi_mlx.server.conversation import (
    Answer,
    AnswerEvent,
    CompletionRequest,
    DeltaEvent,
    FinishEvent,
    TokenLogprobs,
    total_usage,
)
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.openai.chat_request import GenerationBody
from kimi_mlx.server.openai.chat_response import DONE, MIN_LOGPROB, openai_error, usage_dict
from kimi_mlx.server.translation import StreamEvent

MAX_LOGPROBS = 5
MAX_PROMPTS = 64

Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
Ids = Annotated[list[Id], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
IdPrompts = Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionBody(GenerationBody):
    """The body of a plain completion."""

    prompt: str | Ids | Prompts | IdPrompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: str | None = Field(None, description="Not supported.")
    best_of: int | None = Field(None, ge=1, le=20, description="Only as many as `n` are supported.")

    def to_completion_requests(self) -> list[CompletionRequest]:
        """What is asked, one for each prompt.

        Raises:
            ApiError: what we do not have.
        """
        if self.suffix:
            raise ApiError(400, "`suffix` is not supported: leave it out", "unsupported_parameter", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "`best_of` is not supported: leave it out", "unsupported_parameter", "best_of")
        if self.echo and self.logprobs is not None:
            message = "`logprobs` of the prompt are not computed: leave out `echo`"
            raise ApiError(400, message, "unsupported_parameter", "logprobs")
        return [
            CompletionRequest(**self.generation_params(), top_logprobs=self.logprobs, prompt=prompt)
            for prompt in self._prompts()
        ]

    def _prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(id for id in self.prompt if isinstance(id, int))]
        return [each if isinstance(each, str) else tuple(each) for each in self.prompt if not isinstance(each, int)]


class CompletionFormatter:
    """The answers to one request, to several prompts too: then they are numbered through.

    Args:
        id: of the answer.
        model: its name.
        created: when, in seconds of Unix.
        echoes: for each answer, what it begins with.
        include_usage: a stream ends with it.
    """

    def __init__(self, id: str, model: str, created: int, echoes: Sequence[str], *, include_usage: bool):
        self._head: dict[str, Any] = {"id": id, "object": "text_completion", "created": created, "model": model}
        self._echoes, self._include_usage = echoes, include_usage
        self._ends: list[FinishEvent] = []
        self._lengths = [len(echo) for echo in echoes]

    def begin(self) -> Iterator[StreamEvent]:
        """The prompts, if they are wanted."""
        for index, echo in enumerate(self._echoes):
            if echo:
                yield self._chunk(index, echo)

    def add(self, item: AnswerEvent) -> Iterator[StreamEvent]:
        """Chunks."""
        if isinstance(item, DeltaEvent):
            yield self._chunk(item.index, item.delta.text, item.logprobs)
        elif isinstance(item, FinishEvent):
            self._ends.append(item)
            yield self._chunk(item.index, "", finish_reason=item.reason)

    def end(self) -> Iterator[StreamEvent]:
        """The figures, and the end."""
        if self._include_usage:
            yield StreamEvent.from_json(self._head | {"choices": [], "usage": usage_dict(total_usage(self._ends))})
        yield DONE

    def fail(self, error: ApiError) -> Iterable[StreamEvent]:
        """The error as a chunk."""
        return (StreamEvent.from_json(openai_error(error)), DONE)

    def full_response(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The object."""
        choices = [
            {
                "index": answer.end.index,
                "text": self._echoes[answer.end.index] + answer.delta.text,
                "logprobs": self._logprobs(answer.end.index, answer.logprobs),
                "finish_reason": answer.end.reason,
            }
            for answer in answers
        ]
        return self._head | {"choices": choices, "usage": usage_dict(total_usage(each.end for each in answers))}

    def _chunk(
        self, index: int, text: str, logprobs: Sequence[TokenLogprobs] = (), finish_reason: str | None = None
    ) -> StreamEvent:
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logprobs),
            "finish_reason": finish_reason,
        }
        return StreamEvent.from_json(
            self._head | {"choices": [choice]} | ({"usage": None} if self._include_usage else {})
        )

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """In the old shape: parallel lists."""
        if not tokens:
            return None
        texts = [each.token.decode(errors="replace") for each in tokens]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(each.logprob, MIN_LOGPROB) for each in tokens],
            "top_logprobs": [
                {token.decode(errors="replace"): max(logprob, MIN_LOGPROB) for token, logprob in each.top}
                for each in tokens
            ],
            "text_offset": offsets,
        }

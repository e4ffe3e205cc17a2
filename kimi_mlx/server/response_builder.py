"""One answer: the engine's events in, pieces and the end out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from kimi_mlx.engine.request import Finished, Statistics, Token
from kimi_mlx.errors import TextError
from kimi_mlx.server.conversation import DeltaEvent, FinishEvent, StopReason, TokenLogprobs, Usage
from kimi_mlx.server.stops import StopSequences
from kimi_mlx.server.tool_calls import CallIdAllocator
from kimi_mlx.text.messages import Delta
from kimi_mlx.text.output import OutputParser
from kimi_mlx.text.tokenizer import Tokenizer


class TokenReader(Protocol):
    """Makes text of tokens."""

    def add(self, token_id: int) -> Delta:
        """What a token adds."""
        ...

    def finish(self) -> Delta:
        """What is left when no more come."""
        ...


class PlainReader:
    """Text as it is, without reasoning and calls; control tokens are left out."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = tokenizer.detokenizer()
        self._control = frozenset(tokenizer.special_tokens.values())

    def add(self, token_id: int) -> Delta:
        """What a token adds."""
        try:
            return Delta() if token_id in self._control else Delta(self._decoder.add(token_id))
        except TextError:  # an id that the vocabulary does not have
            return Delta(self._decoder.finish() + "\ufffd")

    def finish(self) -> Delta:
        """Half a character, if there is one."""
        return Delta(self._decoder.finish())


class ChatReader:
    """Reasoning, text and calls, whose ids are those of the client's kind."""

    def __init__(self, parser: OutputParser, ids: CallIdAllocator):
        self._parser, self._ids = parser, ids

    def add(self, token_id: int) -> Delta:
        """What a token adds."""
        return self._ids.assign(self._parser.add(token_id))

    def finish(self) -> Delta:
        """What is still open."""
        return self._ids.assign(self._parser.finish())


class ResponseBuilder:
    """One answer as it comes.

    Args:
        index: which of several.
        tokenizer: for the bytes of tokens.
        reader: of the tokens.
        stop: texts that end the answer.
        counts_prompt: whether its prompt is not counted with another answer already.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, reader: TokenReader, stop: Sequence[str], *, counts_prompt: bool
    ):
        self.index = index
        self._counts_prompt = counts_prompt
        self._tokenizer = tokenizer
        self._reader = reader
        self._stops = StopSequences(stop)
        self._has_calls = False
        self._tokens = _Tokens()
        self.generated = 0
        self._reasoning = 0
        self._unassigned = 0  # tokens since the last that showed anything
        self._control = frozenset(tokenizer.special_tokens.values())

    @property
    def is_stopped(self) -> bool:
        """Whether one of the texts has ended it: the engine is to be told."""
        return self._stops.found is not None

    def add(self, token: Token) -> Iterator[DeltaEvent]:
        """Take a token; nothing counts after the end."""
        if self.is_stopped:
            return
        self.generated += 1
        delta = self._reader.add(token.id)
        if token.logprobs is not None and token.id not in self._control:
            top = tuple((self._bytes(id), logprob) for id, logprob in token.logprobs.top)
            self._tokens.add(TokenLogprobs(self._bytes(token.id), token.logprobs.token, top))
        self._count(delta)
        yield from self._piece(delta, self._stops.add(delta.text))

    def finish(self, event: Finished) -> Iterator[DeltaEvent | FinishEvent]:
        """The rest, and the end."""
        if not self.is_stopped:
            delta = self._reader.finish()
            self._count(delta)
            yield from self._piece(delta, self._stops.add(delta.text))
            if not self.is_stopped:
                yield from self._piece(Delta(), self._stops.finish())
        yield FinishEvent(self.index, self._reason(event), self._stops.found, self._usage(event.statistics))

    def _reason(self, event: Finished) -> StopReason:
        if self.is_stopped or event.reason == "cancelled":
            return "stop"
        return "tool_calls" if self._has_calls and event.reason == "stop" else event.reason

    def _usage(self, figures: Statistics) -> Usage:
        prompt = (figures.prompt_tokens, figures.cached_tokens) if self._counts_prompt else (0, 0)
        return Usage(prompt[0], self.generated, prompt[1], self._reasoning)

    def _count(self, delta: Delta) -> None:
        """Which tokens were thought: those that showed reasoning, and those before them that showed nothing yet."""
        self._unassigned += 1
        if delta:
            self._reasoning += self._unassigned if delta.reasoning else 0
            self._unassigned = 0

    def _piece(self, delta: Delta, shown: str) -> Iterator[DeltaEvent]:
        self._has_calls = self._has_calls or bool(delta.tool_call_deltas)
        if delta and not delta.text:  # something else begins, and text that was held back stands before it
            held = self._stops.finish()
            if held:
                yield DeltaEvent(self.index, Delta(held), self._tokens.release(len(held)))
        if delta.text:
            self._tokens.place(len(delta.text))
        elif delta:
            self._tokens.drop()
        delta = replace(delta, text=shown)
        if delta:
            yield DeltaEvent(self.index, delta, self._tokens.release(len(shown)))

    def _bytes(self, id: int) -> bytes:
        try:
            return self._tokenizer.token_bytes(id)
        except TextError:
            return b""


class _Tokens:
    """Log probabilities of tokens that wait until the text is shown that they made."""

    def __init__(self) -> None:
        self._new: list[TokenLogprobs] = []
        self._placed: list[tuple[int, TokenLogprobs]] = []
        self._length = 0
        self._shown = 0

    def add(self, token: TokenLogprobs) -> None:
        self._new.append(token)

    def place(self, length: int) -> None:
        """The new tokens have made so many characters of text."""
        self._placed += [(self._length, token) for token in self._new]
        self._new = []
        self._length += length

    def drop(self) -> None:
        """They have made something else."""
        self._new = []

    def release(self, length: int) -> tuple[TokenLogprobs, ...]:
        """Those whose text begins in the next so many characters."""
        self._shown += length
        shown = tuple(token for at, token in self._placed if at < self._shown)
        self._placed = self._placed[len(shown) :]
        return shown

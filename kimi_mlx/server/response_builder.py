"""Build one answer: tokens of the engine in, deltas and a FinishEvent out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from kimi_mlx.engine.events import Finished, Logprobs, PromptLogprobs, Statistics, Token
from kimi_mlx.errors import TextError
from kimi_mlx.server.api_types import DeltaEvent, FinishEvent, PromptEvent, StopReason, TokenLogprobs, Usage
from kimi_mlx.text.call_ids import CallIdAllocator
from kimi_mlx.text.messages import Delta
from kimi_mlx.text.output import OutputParser
from kimi_mlx.text.tokenizer import Tokenizer


class TokenReader(Protocol):
    """Turns tokens into text."""

    def add(self, token_id: int) -> Delta:
        """Return the delta of a token."""
        ...

    def finish(self) -> Delta:
        """Return the remaining delta after the last token."""
        ...


class PlainReader:
    """Reads plain text, without reasoning and tool calls; drops control tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = tokenizer.detokenizer()
        self._control = frozenset(tokenizer.special_tokens.values())

    def add(self, token_id: int) -> Delta:
        """Return the delta of a token."""
        try:
            return Delta() if token_id in self._control else Delta(self._decoder.add(token_id))
        except TextError:  # an id that is not in the vocabulary
            return Delta(self._decoder.finish() + "\ufffd")

    def finish(self) -> Delta:
        """Return a replacement for an incomplete character, if there is one."""
        return Delta(self._decoder.finish())


class ChatReader:
    """Reads reasoning, text and tool calls; gives the calls ids in the client's format."""

    def __init__(self, parser: OutputParser, ids: CallIdAllocator):
        self._parser, self._ids = parser, ids

    def add(self, token_id: int) -> Delta:
        """Return the delta of a token."""
        return self._ids.assign(self._parser.add(token_id))

    def finish(self) -> Delta:
        """Return the remaining delta."""
        return self._ids.assign(self._parser.finish())


class StopTokenReader:
    """Drops the tokens that end an answer, which another reader would read as text.

    Args:
        reader: reader of all other tokens.
        stop_ids: tokens that end the answer.
    """

    def __init__(self, reader: TokenReader, stop_ids: Collection[int]):
        self._reader, self._stop_ids = reader, stop_ids

    def add(self, token_id: int) -> Delta:
        """Return the delta of a token."""
        return Delta() if token_id in self._stop_ids else self._reader.add(token_id)

    def finish(self) -> Delta:
        """Return the remaining delta."""
        return self._reader.finish()


class StopSequences:
    """Finds stop texts across deltas; holds back text that may be the beginning of one.

    Args:
        texts: stop texts; an empty one is not allowed.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts = tuple(texts)
        self._held = ""
        self.matched: str | None = None
        """Stop text that ended the answer; None before a match."""

    def add(self, text: str) -> str:
        """Add text; return the text that can be sent now. Nothing is sent after a match."""
        if self.matched is not None:
            return ""
        if not self._texts:
            return text
        text = self._held + text
        matches = [(at, stop) for stop in self._texts if (at := text.find(stop)) >= 0]
        if matches:
            at, self.matched = min(matches, key=lambda match: match[0])
            self._held = ""
            return text[:at]
        num_held = max(_overlap(text, stop) for stop in self._texts)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """Return the text that was held back."""
        held = self._held
        self._held = ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of a text that may be the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class ResponseBuilder:
    """Builds one answer from the engine's events.

    Args:
        index: index of the answer.
        tokenizer: tokenizer, for the bytes of tokens.
        reader: reader of the tokens.
        stop: stop texts.
        counts_prompt: whether this answer's usage includes the prompt; True for the first answer to each prompt.
        min_tokens: number of tokens whose text is not searched for stop texts.
        has_all_logprobs: whether the log probabilities of all tokens are returned, not only those of the text.
        prompt: token ids of the prompt if its log probabilities are returned.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        reader: TokenReader,
        stop: Sequence[str],
        *,
        counts_prompt: bool,
        min_tokens: int = 0,
        has_all_logprobs: bool = False,
        prompt: Sequence[int] = (),
    ):
        self.index = index
        self._counts_prompt = counts_prompt
        self._min_tokens, self._has_all_logprobs = min_tokens, has_all_logprobs
        self._prompt, self._prompt_logprobs = prompt, list[Logprobs]()
        self._tokenizer = tokenizer
        self._reader = reader
        self._stops = StopSequences(stop)
        self._has_calls = False
        self._logprobs = _LogprobBuffer()
        self.num_tokens = 0
        self._num_reasoning = 0
        self._num_unassigned = 0  # tokens since the last one that changed the answer
        self._control = frozenset(tokenizer.special_tokens.values())

    @property
    def is_stopped(self) -> bool:
        """Whether a stop text has ended the answer; its request should then be cancelled."""
        return self._stops.matched is not None

    def add_prompt(self, event: PromptLogprobs) -> None:
        """Add log probabilities of the prompt."""
        self._prompt_logprobs += event.tokens

    def add(self, token: Token) -> Iterator[PromptEvent | DeltaEvent]:
        """Add a token; tokens after a stop text are ignored."""
        if self.is_stopped:
            return
        yield from self._prompt_event()
        self.num_tokens += 1
        self._num_unassigned += 1
        delta = self._reader.add(token.id)
        if token.logprobs is not None and (self._has_all_logprobs or token.id not in self._control):
            self._logprobs.add(self._token_logprobs(token.id, token.logprobs))
        self._count_reasoning(delta)
        is_searched = self.num_tokens > self._min_tokens
        yield from self._events(delta, self._stops.add(delta.text) if is_searched else delta.text)

    def finish(self, event: Finished) -> Iterator[PromptEvent | DeltaEvent | FinishEvent]:
        """Yield the remaining deltas, and the FinishEvent."""
        yield from self._prompt_event()
        if not self.is_stopped:
            delta = self._reader.finish()
            self._count_reasoning(delta)
            yield from self._events(delta, self._stops.add(delta.text))
            if not self.is_stopped:
                yield from self._events(Delta(), self._stops.finish())
        if self._has_all_logprobs and (rest := self._logprobs.release_all()):
            yield DeltaEvent(self.index, Delta(), rest)
        usage = self._usage(event.statistics)
        yield FinishEvent(self.index, self._reason(event), self._stops.matched, usage, event.statistics)

    def _prompt_event(self) -> Iterator[PromptEvent]:
        """Yield the tokens of the prompt once, if their log probabilities are returned."""
        if self._prompt:
            first, *others = self._prompt
            logprobs = map(self._token_logprobs, others, self._prompt_logprobs)
            yield PromptEvent(self.index, self._bytes(first), tuple(logprobs))
            self._prompt, self._prompt_logprobs = (), []

    def _token_logprobs(self, id: int, logprobs: Logprobs) -> TokenLogprobs:
        top = tuple((self._bytes(top_id), logprob) for top_id, logprob in logprobs.top)
        return TokenLogprobs(self._bytes(id), logprobs.token, top)

    def _reason(self, event: Finished) -> StopReason:
        if self.is_stopped or event.reason == "cancelled":
            return "stop"
        return "tool_calls" if self._has_calls and event.reason == "stop" else event.reason

    def _usage(self, statistics: Statistics) -> Usage:
        prompt = (statistics.prompt_tokens, statistics.cached_tokens) if self._counts_prompt else (0, 0)
        return Usage(prompt[0], self.num_tokens, prompt[1], self._num_reasoning)

    def _count_reasoning(self, delta: Delta) -> None:
        """Count reasoning tokens, including earlier tokens that changed nothing, such as parts of a character."""
        if delta:
            self._num_reasoning += self._num_unassigned if delta.reasoning else 0
            self._num_unassigned = 0

    def _events(self, delta: Delta, text: str) -> Iterator[DeltaEvent]:
        """Yield a delta with the part of its text that can be sent now."""
        self._has_calls = self._has_calls or bool(delta.tool_call_deltas)
        if delta and not delta.text:  # other content begins: text that was held back comes before it
            held = self._stops.finish()
            if held:
                yield DeltaEvent(self.index, Delta(held), self._logprobs.release(len(held)))
        if delta.text:
            self._logprobs.place(len(delta.text))
        elif delta:
            self._logprobs.drop()
        delta = replace(delta, text=text)
        if delta:
            yield DeltaEvent(self.index, delta, self._logprobs.release(len(text)))

    def _bytes(self, id: int) -> bytes:
        try:
            return self._tokenizer.token_bytes(id)
        except TextError:
            return b""


class _LogprobBuffer:
    """Log probabilities of tokens, kept until the text of the tokens is sent."""

    def __init__(self) -> None:
        self._new: list[TokenLogprobs] = []
        self._placed: list[tuple[int, TokenLogprobs]] = []
        self._length = 0
        self._sent = 0

    def add(self, token: TokenLogprobs) -> None:
        self._new.append(token)

    def place(self, length: int) -> None:
        """Assign the new tokens to the next `length` characters of text."""
        self._placed += [(self._length, token) for token in self._new]
        self._new = []
        self._length += length

    def drop(self) -> None:
        """Discard the new tokens, which are not part of the text."""
        self._new = []

    def release(self, length: int) -> tuple[TokenLogprobs, ...]:
        """Return the tokens whose text starts within the next `length` sent characters."""
        self._sent += length
        released = tuple(token for at, token in self._placed if at < self._sent)
        self._placed = self._placed[len(released) :]
        return released

    def release_all(self) -> tuple[TokenLogprobs, ...]:
        """Return all tokens that were not released."""
        released = (*(token for _, token in self._placed), *self._new)
        self._placed, self._new = [], []
        return released

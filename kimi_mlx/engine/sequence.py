"""One sequence: what was asked, what is known of the answer, how far the model has read it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from kimi_mlx.engine.chooser import Chooser
from kimi_mlx.engine.drafts import PromptLookup, accepted_length
from kimi_mlx.engine.kv_cache_pool import ConversationCache
from kimi_mlx.engine.request import Finished, FinishReason, Logprobs, Request, Statistics, Token
from kimi_mlx.model.cache import LatentCache


class Sequence:
    """A request that is being answered.

    Args:
        number: of the request.
        request: what is asked.
        max_tokens: new tokens at most.
        chooser: of its tokens.
        speculate: tokens drafted a step at most.

    Attributes:
        tokens: the prompt, and what was drawn.
        fed: how many tokens are in the cache, or on their way there; one more than are known while a step goes on from
            a token that nobody has read yet.
        generated: tokens drawn.
        run: goes up when it begins, is put back and ends: what a step gives belongs to the run in which it was made.
        draft: what may follow.
    """

    def __init__(self, number: int, request: Request, max_tokens: int, chooser: Chooser, speculate: int):
        self.number, self.request, self.max_tokens, self.chooser = number, request, max_tokens, chooser
        self.tokens = list(request.prompt)
        self.fed = self.generated = self.run = 0
        self.draft: tuple[int, ...] = ()
        self.cache: ConversationCache | None = None
        self._lookup = PromptLookup(speculate) if speculate else None
        if self._lookup is not None:
            self._lookup.extend(request.prompt)
        self._cached: int | None = None
        self._steps = 0
        self._started = self._first_token_at = 0.0

    @property
    def layers(self) -> list[LatentCache]:
        """Its cache, layer by layer."""
        assert self.cache is not None
        return self.cache.layers

    @property
    def room(self) -> int:
        """New tokens that may still come."""
        return self.max_tokens - self.generated

    def begin(self, cache: ConversationCache, cached: int) -> None:
        """Go on with a cache that holds the first tokens."""
        self.cache, self.fed = cache, cached
        self.run += 1
        if self._cached is None:
            self._cached = cached
            self._started = time.perf_counter()

    def end(self) -> ConversationCache:
        """End its run; returns the cache, with what was computed."""
        assert self.cache is not None
        cache, self.cache, self.draft = self.cache, None, ()
        self.run += 1
        cache.settle()
        return cache

    def feed(self, count: int) -> tuple[int, ...]:
        """The next tokens that are known, so many at most; they count as fed."""
        assert self.cache is not None
        chunk = self.tokens[self.fed : self.fed + count]
        self.cache.tokens += chunk
        self.fed += len(chunk)
        return tuple(chunk)

    def until_stop(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends the answer."""
        stop_ids = self.request.stop_ids
        end = next((at for at, token in enumerate(tokens) if token in stop_ids), len(tokens))
        return tokens[: end + 1]

    def accept(self, drawn: list[int]) -> list[int]:
        """Of the tokens behind each one of a draft those that count: up to the first that is not the draft's."""
        accepted = accepted_length(self.draft, drawn)
        if self._lookup is not None:
            self._lookup.judge(len(self.draft), accepted)
        return self.until_stop(drawn[: accepted + 1])

    def settle_draft(self, kept: list[int]) -> None:
        """Forget what was fed of a draft and is not kept; the last of the kept tokens was not fed."""
        assert self.cache is not None
        self.cache.tokens += kept[:-1]
        self.cache.settle()
        self.fed = len(self.tokens) + len(kept) - 1
        self.draft = ()

    def next_draft(self) -> tuple[int, ...]:
        """What may follow the tokens that are known."""
        return () if self._lookup is None else self._lookup.draft(self.room - 1)

    def take(self, tokens: list[int], logprobs: list[Logprobs | None]) -> Iterator[Token]:
        """Tokens were drawn."""
        self._steps += bool(self.generated)
        self._first_token_at = self._first_token_at or time.perf_counter()
        if self._lookup is not None:
            self._lookup.extend(tokens)
        self.chooser.advance(tokens)
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.tokens.append(token)
            self.generated += 1
            yield Token(token, logprob)

    @property
    def reason(self) -> FinishReason | None:
        """Why the answer has ended, if it has."""
        if self.generated and self.tokens[-1] in self.request.stop_ids:
            return "stop"
        return None if self.room > 0 else "length"

    def finished(self, reason: FinishReason, peak_memory_bytes: int) -> Finished:
        """The end, with its figures."""
        now = time.perf_counter()
        started = self._started or now
        first = self._first_token_at or now
        return Finished(
            reason,
            Statistics(
                prompt_tokens=len(self.request.prompt),
                cached_tokens=self._cached or 0,
                generated_tokens=self.generated,
                ttft_s=first - started,
                decode_s=now - first,
                peak_memory_bytes=peak_memory_bytes,
                decode_steps=self._steps,
            ),
        )

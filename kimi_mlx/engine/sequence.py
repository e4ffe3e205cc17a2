"""One sequence: prefill in chunks, then decode with one step in flight while the last token is handed out."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TypeVar

import mlx.core as mx

from kimi_mlx.engine.cache import CacheShelf, ConversationCache
from kimi_mlx.engine.drafts import PromptLookup, accepted_length
from kimi_mlx.engine.request import Event, Finished, FinishReason, Prefilled, Request, Statistics, Token
from kimi_mlx.engine.sampling import Draw
from kimi_mlx.engine.steps import Step, Steps
from kimi_mlx.parallel.exchange import Said

Result = TypeVar("Result")

Turns = Generator[Event | None, None, Result]
"""Events, and None where another sequence may have its turn."""


class Sequence:
    """A request that is being answered.

    Args:
        steps: how this rank makes steps.
        request: what is asked.
        max_tokens: new tokens at most.
        draw: how tokens are drawn.
        is_cancelled: whether the leader wants to stop; false on other ranks.
        hear: told of everything that the leader says.
        chunk: tokens a prefill step.
        speculate: tokens drafted a step at most.
    """

    def __init__(
        self,
        steps: Steps,
        request: Request,
        max_tokens: int,
        draw: Draw,
        is_cancelled: Callable[[], bool],
        hear: Callable[[Said], None],
        chunk: int,
        speculate: int,
    ):
        self._steps, self._request, self._max_tokens = steps, request, max_tokens
        self._draw, self._is_cancelled, self._hear, self._chunk = draw, is_cancelled, hear, chunk
        self._speculate = speculate
        self._generated = self._decode_steps = 0
        self._first_token_at: float | None = None
        self.is_prefilling = True
        """Until the prompt is read."""

    def run(self, shelf: CacheShelf) -> Turns[None]:
        """Answer; what was computed stays on the shelf."""
        started = time.perf_counter()
        mx.reset_peak_memory()
        prompt = self._request.prompt
        cache, cached = shelf.take(prompt)
        try:
            step = yield from self._prefill(cache, cached)
            reason: FinishReason = "cancelled"
            if step is not None:
                self.is_prefilling = False
                decode = self._decode_drafts if self._speculate else self._decode
                reason = yield from decode(step, cache)
        finally:
            cache.settle()
            shelf.give_back(cache)
        ended = time.perf_counter()
        first_token_at = self._first_token_at or ended
        yield Finished(
            reason,
            Statistics(
                prompt_tokens=len(prompt),
                cached_tokens=cached,
                generated_tokens=self._generated,
                ttft_s=first_token_at - started,
                decode_s=ended - first_token_at,
                peak_memory_bytes=mx.get_peak_memory(),
                decode_steps=self._decode_steps,
            ),
        )

    def _prefill(self, cache: ConversationCache, cached: int) -> Turns[Step | None]:
        """Feed the prompt; returns the step of its last chunk, None if stopped before."""
        prompt, step = self._request.prompt, None
        total = len(prompt)
        yield Prefilled(cached, total)
        for start in range(cached, total, self._chunk):
            chunk = prompt[start : start + self._chunk]
            is_last = start + len(chunk) == total
            step = self._start(mx.array([chunk]), cache, last=int(is_last))
            cache.tokens.extend(chunk)
            yield None
            self._steps.wait(step, cache.layers)
            if not is_last and self._is_stopped(self._steps.said(step)):
                return None
            yield Prefilled(start + len(chunk), total)
        return step

    def _decode(self, step: Step, cache: ConversationCache) -> Turns[FinishReason]:
        """Draw tokens; the next step is started before a token is read."""
        while True:
            drawn, following = self._steps.draw(step, self._draw), None
            if self._generated + 1 < self._max_tokens:
                following = self._start(mx.zeros((1, 1), mx.uint32) if drawn is None else drawn[None], cache, ahead=1)
            yield None
            tokens, said = self._steps.read(step, following)
            is_stopped = self._is_stopped(said)
            yield from self._hand_out(tokens)
            self._generated += not tokens  # the last one, which only the leader knows
            if following is None or tokens[-1] in self._request.stop_ids or is_stopped:
                if following is not None:
                    self._steps.give_up(following)
                return self._reason(tokens)
            cache.tokens += tokens
            self._decode_steps += 1
            step = following

    def _decode_drafts(self, step: Step, cache: ConversationCache) -> Turns[FinishReason]:
        """Draw tokens, and with each step check a draft of those behind it."""
        if not self._steps.has_head:
            return (yield from self._follow(step, cache))
        lookup = PromptLookup(self._speculate)
        lookup.extend(self._request.prompt)
        self._steps.draw(step, self._draw)  # in this turn: other sequences draw behind it
        fed: list[int] = []
        draft: tuple[int, ...] = ()
        while True:
            yield None
            self._steps.draw(step, self._draw)
            tokens, said = self._steps.read(step)
            accepted = accepted_length(draft, tokens)
            lookup.judge(len(draft), accepted)
            tokens = self._until_stop(tokens[: accepted + 1])
            kept = fed[: len(tokens)]
            cache.tokens += kept
            cache.settle()
            yield from self._hand_out(tokens)
            lookup.extend(tokens)
            room = self._max_tokens - self._generated
            if self._is_stopped(said) or not room or tokens[-1] in self._request.stop_ids:
                self._steps.lead(0, kept)
                return self._reason(tokens)
            draft = lookup.draft(room - 1)
            fed = [tokens[-1], *draft]
            self._steps.lead(len(fed), kept)
            step = self._start(mx.array([fed]), cache, last=len(fed))
            self._decode_steps += 1

    def _follow(self, step: Step, cache: ConversationCache) -> Turns[FinishReason]:
        """What the ranks of a pipeline do that do not draw, in the leader's turns: it says how long each step is."""
        while True:
            yield None
            self._is_stopped(self._steps.said(step))
            length, kept = self._steps.follow()
            cache.tokens += kept
            cache.settle()
            if not length:
                return "stop"
            step = self._start(mx.zeros((1, length), mx.uint32), cache, last=length)

    def _start(self, tokens: mx.array, cache: ConversationCache, last: int = 1, ahead: int = 0) -> Step:
        """Start a step.

        Args:
            tokens: (1, L).
            cache: of the sequence.
            last: tokens to draw.
            ahead: tokens that are drawn and not handed out.
        """
        position = len(self._request.prompt) + self._generated + ahead
        return self._steps.start(tokens, cache.layers, self._is_cancelled(), self._draw, last, position)

    def _hand_out(self, tokens: list[int]) -> Turns[None]:
        for token in tokens:
            self._generated += 1
            self._first_token_at = self._first_token_at or time.perf_counter()
            yield Token(token)

    def _until_stop(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends the answer."""
        end = next((at for at, token in enumerate(tokens) if token in self._request.stop_ids), len(tokens))
        return tokens[: end + 1]

    def _reason(self, tokens: list[int]) -> FinishReason:
        """Why the answer has ended with these tokens."""
        if tokens and tokens[-1] in self._request.stop_ids:
            return "stop"
        return "length" if self._generated == self._max_tokens else "cancelled"

    def _is_stopped(self, said: Said) -> bool:
        self._hear(said)
        return said.is_stopped

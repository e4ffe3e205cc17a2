"""One sequence: prefill in chunks, then decode with one step in flight while the last token is handed out."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TypeVar

import mlx.core as mx

from kimi_mlx.engine.cache import CacheShelf, ConversationCache
from kimi_mlx.engine.request import Event, Finished, FinishReason, Prefilled, Request, Statistics, Token
from kimi_mlx.engine.sampling import Sampler
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
        draw: from logits (1, vocab_size) to a token (1,), called once a token in their order.
        is_cancelled: whether the leader wants to stop; false on other ranks.
        hear: told of everything that the leader says.
        chunk: tokens a prefill step.
    """

    def __init__(
        self,
        steps: Steps,
        request: Request,
        max_tokens: int,
        draw: Sampler,
        is_cancelled: Callable[[], bool],
        hear: Callable[[Said], None],
        chunk: int,
    ):
        self._steps, self._request, self._max_tokens = steps, request, max_tokens
        self._draw, self._is_cancelled, self._hear, self._chunk = draw, is_cancelled, hear, chunk
        self._generated = 0
        self._first_token_at: float | None = None

    @property
    def is_prefilling(self) -> bool:
        """Whether there is no token yet."""
        return not self._generated

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
                reason = yield from self._decode(step, cache)
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
            step = self._start(mx.array([chunk]), cache, self._draw if is_last else None)
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
            token = self._steps.draw(step, self._draw)
            following = None
            if self._generated + 1 < self._max_tokens:
                tokens = mx.zeros((1, 1), mx.uint32) if token is None else token[:, None]
                following = self._start(tokens, cache, self._draw)
            yield None
            value, said = self._steps.read(step, following)
            is_stopped = self._is_stopped(said)
            self._generated += 1
            self._first_token_at = self._first_token_at or time.perf_counter()
            if value is not None:
                yield Token(value)
            if following is None:
                return "stop" if value in self._request.stop_ids else "length"
            assert value is not None
            if value in self._request.stop_ids or is_stopped:
                self._steps.give_up(following)
                return "stop" if value in self._request.stop_ids else "cancelled"
            cache.tokens.append(value)
            step = following

    def _start(self, tokens: mx.array, cache: ConversationCache, draw: Sampler | None) -> Step:
        return self._steps.start(tokens, cache.layers, self._is_cancelled(), draw)

    def _is_stopped(self, said: Said) -> bool:
        self._hear(said)
        return said.is_stopped

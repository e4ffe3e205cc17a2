"""Prefill in chunks, then decode with one step in flight while the last token is handed out.

Letters: B batch (1 here), L length.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.cache import ConversationCache
from kimi_mlx.engine.free_memory import agreed_chunk
from kimi_mlx.engine.request import (
    Event,
    Finished,
    FinishReason,
    Prefilled,
    Request,
    Sampling,
    Statistics,
    Token,
)
from kimi_mlx.engine.sampling import Sampler, make_sampler
from kimi_mlx.errors import EngineError
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.collectives import GroupExchange
from kimi_mlx.parallel.group import Group, SingleGroup

Told = tuple[mx.array, int] | None
"""What the ranks said in a step (see GroupExchange); None without others."""


class Engine:
    """One model (or a rank's share of it) and the cache of one conversation.

    On several ranks each one runs the same requests in the same order; only the leader decides to stop early.

    Args:
        model: the model; if it holds a rank's share, its exchange says who the other ranks are.
        is_cancelled: asked on the leader whether the present request should stop.
        prefill_chunk: tokens a prefill step; None: as many as pay and fit, the same on all ranks.
    """

    def __init__(
        self,
        model: Model,
        is_cancelled: Callable[[], bool] = lambda: False,
        prefill_chunk: int | None = None,
    ):
        self._model = model
        self._exchange = model.exchange if isinstance(model.exchange, GroupExchange) else None
        self._group: Group = SingleGroup() if self._exchange is None else self._exchange.group
        self._is_cancelled = is_cancelled
        self._prefill_chunk = prefill_chunk or agreed_chunk(model, self._group)
        self.cache = ConversationCache(model)

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request: Prefilled (several), Token (several), Finished (once, last).

        Breaking off the iteration is allowed on a single rank; the cache keeps what was computed.

        Raises:
            EngineError: an empty prompt, a foreign token id, or more tokens than the context holds.
        """
        max_tokens = self._check(request)
        sample = make_sampler(request.sampling, self._model.config.vocab_size)
        started = time.perf_counter()
        mx.reset_peak_memory()
        seed = self._seed(request.sampling)
        cached = self.cache.reuse(request.prompt)
        generated, first_token_at = 0, started
        reason: FinishReason = "length"
        try:
            logits = yield from self._prefill(request.prompt, cached)
            if logits is None:
                reason = "cancelled"
            else:
                drawn = _seeded(sample, seed, len(request.prompt))
                for token, is_last in self._decode(logits, drawn, max_tokens):
                    generated += 1
                    if generated == 1:
                        first_token_at = time.perf_counter()
                    yield Token(token)
                    if token in request.stop_ids:
                        reason = "stop"
                        break
                    if is_last:
                        reason = "cancelled" if generated < max_tokens else "length"
        finally:
            self.cache.settle()
        ended = time.perf_counter()
        first_token_at = first_token_at if generated else ended
        yield Finished(
            reason,
            Statistics(
                prompt_tokens=len(request.prompt),
                cached_tokens=cached,
                generated_tokens=generated,
                ttft_s=first_token_at - started,
                decode_s=ended - first_token_at,
                peak_memory_bytes=mx.get_peak_memory(),
            ),
        )

    def _check(self, request: Request) -> int:
        """Refuse what cannot be served; returns how many tokens may be generated."""
        config, length = self._model.config, len(request.prompt)
        if not length:
            raise EngineError("the prompt has no tokens")
        foreign = [id for id in request.prompt if not 0 <= id < config.vocab_size]
        if foreign:
            raise EngineError(f"token id {foreign[0]} is outside the vocabulary of {config.vocab_size}")
        left = config.max_position_embeddings - length
        if left < 1:
            raise EngineError(
                f"the prompt has {length} tokens, the context holds {config.max_position_embeddings}",
                hint="shorten the prompt, or start a new conversation with /reset",
            )
        wanted = request.max_tokens
        if wanted is not None and wanted < 1:
            raise EngineError(f"max_tokens is {wanted}, not at least 1")
        return left if wanted is None else min(wanted, left)

    def _seed(self, sampling: Sampling) -> int | None:
        """The seed of the random numbers, alike on every rank; the leader draws it where the request names none."""
        seed = sampling.seed
        if seed is None and sampling.temperature > 0:
            draw = random.getrandbits(24) if self._group.rank == 0 else 0  # as many bits as a float32 sum keeps
            seed = int(cast(float, self._group.sum(mx.array([float(draw)])).item()))
        return seed

    def _prefill(self, prompt: tuple[int, ...], cached: int) -> Iterator[Prefilled]:
        """Feed the prompt; returns the logits (1, vocab_size) after its last token, None if cancelled."""
        total, logits = len(prompt), None
        yield Prefilled(cached, total)
        for start in range(cached, total, self._prefill_chunk):
            chunk = prompt[start : start + self._prefill_chunk]
            hidden = self._model.hidden(mx.array([chunk]), self.cache.layers, last=1)
            self.cache.tokens.extend(chunk)
            is_last = start + len(chunk) == total
            self._wish()
            if is_last:
                logits = self._model.logits(hidden[:, -1])
            elif self._exchange is not None:
                self._exchange.vote()
            told = self._told()
            mx.eval(logits if is_last else [layer.state for layer in self.cache.layers], told)
            if self._is_stopped(told):
                return None
            yield Prefilled(start + len(chunk), total)
        return logits

    def _decode(self, logits: mx.array, sample: Sampler, max_tokens: int) -> Iterator[tuple[int, bool]]:
        """Yield tokens, and with each whether it is the last; the next step is started before a token is read."""
        token, told = sample(logits), self._told()
        mx.async_eval(token, told)
        for step in range(1, max_tokens + 1):
            following, following_told = token, told
            if step < max_tokens:
                self._wish()
                following = sample(self._model.logits(self._model.hidden(token[:, None], self.cache.layers)[:, -1]))
                following_told = self._told()
                mx.async_eval(following, following_told)
            value = int(cast(int, token.item()))
            is_last = self._is_stopped(told) or step == max_tokens
            yield value, is_last
            if is_last:
                return
            self.cache.tokens.append(value)
            token, told = following, following_told

    def _wish(self) -> None:
        """Say with the next gather whether to stop."""
        if self._exchange is not None:
            self._exchange.wish = self._group.rank == 0 and self._is_cancelled()

    def _told(self) -> Told:
        return None if self._exchange is None else self._exchange.told

    def _is_stopped(self, told: Told) -> bool:
        """Whether to stop, the same on all ranks.

        Raises:
            RingError: a rank is lost.
        """
        if self._exchange is None or told is None:
            return self._is_cancelled()
        return self._exchange.is_stopped(told)


def _seeded(sample: Sampler, seed: int | None, position: int) -> Sampler:
    """A sampler whose random numbers depend on nothing but the seed and the position of the token.

    So an answer that is begun anew in the middle goes on as it would have.
    """
    if seed is None:
        return sample
    positions = itertools.count(position)

    def draw(logits: mx.array) -> mx.array:
        mx.random.seed(_mixed(seed, next(positions)))
        return sample(logits)

    return draw


def _mixed(seed: int, position: int) -> int:
    """64 bits from both: a step of SplitMix64 (Steele, Lea and Flood 2014)."""
    mask = (1 << 64) - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)

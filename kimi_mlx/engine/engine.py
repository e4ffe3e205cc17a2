"""The engine: sequences that run, sequences that wait, and whose turn it is."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.batch import Batch
from kimi_mlx.engine.chooser import Chooser
from kimi_mlx.engine.constraint import Constraint
from kimi_mlx.engine.free_memory import agreed_limits
from kimi_mlx.engine.kv_cache_pool import CacheShelf
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.engine.request import Event, Prefilled, Request
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.engine.steps import Steps
from kimi_mlx.errors import EngineError
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.exchange import STAMPS, Said
from kimi_mlx.parallel.group import SingleGroup

MOST_NEWS = STAMPS // 2
"""So many new commands can be told of at a time: their numbers go around at STAMPS."""

MAX_SEQUENCES = 16
"""So many run at a time; further requests wait."""

RESERVE = 256
"""Tokens of an answer for which there must be room when it begins."""

WORTH_WAITING = 64
"""Tokens that another prompt is just about to have read: a request that begins with them waits for it."""


class Engine:
    """One model, or a rank's share of it, and the sequences that it is working on.

    On several ranks each one is given the same requests and cancellations in the same order, and so makes the same
    steps.

    Args:
        model: the model; if it holds a rank's share, its exchange says who the other ranks are.
        count_commands: asked on the leader how many commands it has been given in all; see `news`.
        prefill_chunk: tokens of prompts a step; None: as many as pay and fit, the same on all ranks.
        speculate: tokens drafted a step and sequence at most, found by prompt lookup; 0 drafts none.
        constrain: makes the constraint of a grammar; None: there are no grammars.
        cache_bytes: for the caches of all sequences on each rank; None: most of what is free.
        blocks: the prompt cache on disk; None: there is none.
    """

    def __init__(
        self,
        model: Model,
        count_commands: Callable[[], int] = lambda: 0,
        prefill_chunk: int | None = None,
        speculate: int = 0,
        constrain: Callable[[str], Constraint] | None = None,
        cache_bytes: int | None = None,
        blocks: BlockStore | None = None,
    ):
        self._model = model
        self._steps = Steps(model, count_commands)
        exchange = self._steps.exchange
        group = SingleGroup() if exchange is None else exchange.group
        limits = agreed_limits(model, group, cache_bytes, prefill_chunk)
        self._speculate, self._constrain = speculate, constrain
        self._shelf = CacheShelf(model, limits.cache_tokens, blocks)
        self.context = min(model.config.max_position_embeddings, limits.cache_tokens)
        """Tokens that a sequence may have."""
        # In a pipeline as many batches as ranks are on their way at once.
        num_batches = 1 if self._steps.pipeline is None else self._steps.pipeline.group.size
        self._batches = deque(
            Batch(self._steps, self._shelf, self._hear, limits.chunk, speculate) for _ in range(num_batches)
        )
        self._waiting: deque[Sequence] = deque()
        self._ended: list[tuple[int, Event | EngineError]] = []
        self._commands = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._ended and all(batch.is_idle for batch in self._batches)

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    @property
    def cached_tokens(self) -> int:
        """In the caches, of requests that run and of those that are over."""
        return self._shelf.busy_tokens + self._shelf.idle_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether a prompt is being read: steps take long then."""
        return any(batch.is_prefilling for batch in self._batches)

    def add(self, number: int, request: Request) -> None:
        """Take a request; its events come from `turn`: Prefilled (several), Token (several), Finished (once, last).

        If its grammar fails in the middle, the last one is the error.

        Raises:
            EngineError: an empty prompt, a foreign token id, more tokens than the context holds, or a grammar that is
                none.
        """
        max_tokens = self._check(request)
        constraint = None
        if request.grammar is not None:
            if self._constrain is None:
                raise EngineError("answers cannot be kept to a grammar here")
            constraint = self._constrain(request.grammar)  # on ranks that do not draw, too: all refuse alike
        if not self._steps.has_head:
            constraint = None
        chooser = Chooser(request, self._model.config.vocab_size, self._seed(request), constraint)
        self._waiting.append(Sequence(number, request, max_tokens, chooser, self._speculate))

    def cancel(self, number: int) -> None:
        """End a request, if it has not ended; its Finished says `cancelled`."""
        for sequence in self._waiting:
            if sequence.number == number:
                self._waiting.remove(sequence)
                self._ended.append((number, sequence.finished("cancelled", 0)))
                return
        for batch in self._batches:
            for sequence in batch.members:
                if sequence.number == number:
                    batch.remove(sequence)
                    self._ended.append((number, sequence.finished("cancelled", mx.get_peak_memory())))
                    return

    def turn(self) -> Iterator[tuple[int, Event | EngineError]]:
        """A step of the batch whose turn it is; yields events, each with its request's number. To be read to its end.

        Raises:
            RingError: a rank is lost.
        """
        yield from self._admit()
        while self._ended:
            yield self._ended.pop(0)
        for _ in range(len(self._batches)):
            batch = self._batches[0]
            self._batches.rotate(-1)
            if not batch.is_idle:
                self._make_room(batch)
                yield from batch.turn()
                return

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer one request; breaking off is allowed on a single rank, the cache keeps what was computed."""
        self.add(0, request)
        try:
            while not self.is_idle:
                for _, event in list(self.turn()):
                    if isinstance(event, EngineError):
                        raise event
                    yield event
        finally:
            self._waiting.clear()
            self._ended.clear()
            for batch in self._batches:
                batch.drop()

    def news(self, counted: int) -> int:
        """How many new commands to take now: the same number on all ranks at the same turn.

        Who is idle waits for the next one. Else the leader has said how many it has had.

        Args:
            counted: commands that this rank has carried out.
        """
        if self.is_idle:
            self._commands = counted + 1  # what was said before is out of date
        new = (self._commands - counted) % STAMPS
        return new if new <= MOST_NEWS else 0  # what an older step says is behind what a newer one has said

    def abandon(self) -> None:
        """Forget all requests and all caches, after a step that failed; allowed where there are no other ranks."""
        for batch in self._batches:
            batch.abandon()
        self._ended.clear()
        self._waiting.clear()
        self._shelf.abandon()

    def clear(self) -> None:
        """Forget what was kept for later requests."""
        self._shelf.clear()

    @property
    def _running(self) -> list[Sequence]:
        return [sequence for batch in self._batches for sequence in batch.members]

    def _admit(self) -> Iterator[tuple[int, Event]]:
        """Begin what waits, the first first, as long as there is room."""
        if not self._running and all(batch.is_idle for batch in self._batches):
            mx.reset_peak_memory()
        for sequence in list(self._waiting):
            running = self._running
            wanted = len(sequence.tokens) + min(RESERVE, sequence.room)
            if len(running) >= MAX_SEQUENCES or (running and not self._shelf.has_room(wanted)):
                return
            if any(_is_about_to_read(other, sequence) for other in running):
                continue
            self._waiting.remove(sequence)
            cache, cached = self._shelf.take(sequence.tokens)
            sequence.begin(cache, cached)
            min(self._batches, key=lambda batch: len(batch.members)).members.append(sequence)
            if not sequence.generated:
                yield sequence.number, Prefilled(cached, len(sequence.tokens))

    def _make_room(self, batch: Batch) -> None:
        """Make room for the batch's next step: what is idle goes first, then the youngest sequence is put back."""
        while not self._shelf.make_room(batch.growth) and len(self._running) > 1:
            youngest = max(self._running, key=lambda sequence: sequence.number)
            next(each for each in self._batches if youngest in each.members).remove(youngest)
            self._waiting.appendleft(youngest)

    def _hear(self, said: Said) -> None:
        self._commands = said.commands

    def _check(self, request: Request) -> int:
        """Refuse what cannot be served; returns how many tokens may be generated."""
        config, length = self._model.config, len(request.prompt)
        if not length:
            raise EngineError("the prompt has no tokens")
        ids = [*request.prompt, *(id for id, _ in request.logit_bias)]
        foreign = [id for id in ids if not 0 <= id < config.vocab_size]
        if foreign:
            raise EngineError(f"token id {foreign[0]} is outside the vocabulary of {config.vocab_size}")
        left = self.context - length
        if left < 1:
            is_memory = self.context < config.max_position_embeddings
            raise EngineError(
                f"the prompt has {length} tokens, {'the memory' if is_memory else 'the context'} holds {self.context}",
                hint="shorten the prompt, or start a new conversation with /reset"
                + " (`--cache-memory` sets how much memory there is for it)" * is_memory,
            )
        wanted = request.max_tokens
        if wanted is not None and wanted < 1:
            raise EngineError(f"max_tokens is {wanted}, not at least 1")
        return left if wanted is None else min(wanted, left)

    def _seed(self, request: Request) -> int | None:
        """The seed of the random numbers, alike on every rank; the leader draws it where the request names none."""
        seed, exchange = request.sampling.seed, self._steps.exchange
        if seed is None and request.sampling.temperature > 0:
            seed = random.getrandbits(24)  # as many bits as a float32 sum keeps
            if exchange is not None and self._steps.pipeline is None:  # there the leader alone draws
                mine = mx.array([float(seed if exchange.is_leader else 0)])
                seed = int(cast(float, exchange.group.sum(mine).item()))
        return seed


def _is_about_to_read(other: Sequence, sequence: Sequence) -> bool:
    """Whether a prompt that is being read has much in common with another one that is not read yet."""
    unread = len(other.tokens) - other.fed
    if unread < 1 or len(sequence.tokens) <= other.fed:
        return False
    end = other.fed + WORTH_WAITING
    return other.tokens[:end] == sequence.tokens[:end] and len(other.tokens) >= end

"""The engine: sequences take turns, a step each."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.cache import CacheShelf
from kimi_mlx.engine.free_memory import agreed_chunk
from kimi_mlx.engine.request import Event, Request, Sampling
from kimi_mlx.engine.sampling import make_sampler, seeded
from kimi_mlx.engine.sequence import Sequence, Turns
from kimi_mlx.engine.steps import Steps
from kimi_mlx.errors import EngineError
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.exchange import STAMPS, Said
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.parallel.pipeline import PipelineExchange

MOST_NEWS = STAMPS // 2
"""So many new commands can be told of at a time: their numbers go around at STAMPS."""

MAX_SEQUENCES = 8
"""So many take turns; further requests wait."""


class Engine:
    """One model, or a rank's share of it, and the sequences that it is working on.

    On several ranks each one is given the same requests in the same order. A turn is one step of one sequence, so all
    ranks build the same steps; the leader alone decides to stop a sequence early.

    Args:
        model: the model; if it holds a rank's share, its exchange says who the other ranks are.
        is_cancelled: asked on the leader whether the request of a number should stop.
        count_commands: asked on the leader how many commands it has been given in all; see `news`.
        prefill_chunk: tokens a prefill step; None: as many as pay and fit, the same on all ranks.
        speculate: tokens drafted a step at most, found by prompt lookup; 0 drafts none.
    """

    def __init__(
        self,
        model: Model,
        is_cancelled: Callable[[int], bool] = lambda number: False,
        count_commands: Callable[[], int] = lambda: 0,
        prefill_chunk: int | None = None,
        speculate: int = 0,
    ):
        self._model = model
        self._steps = Steps(model, count_commands)
        self._is_cancelled = is_cancelled
        exchange = self._steps.exchange
        self._prefill_chunk = prefill_chunk or agreed_chunk(
            model, SingleGroup() if exchange is None else exchange.group
        )
        self._speculate = speculate
        self._shelf = CacheShelf(model)
        self._waiting: deque[tuple[int, Request, int]] = deque()
        self._turns: deque[tuple[int, Sequence, Turns[None]]] = deque()
        self._commands = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is no request."""
        return not self._turns and not self._waiting

    @property
    def is_prefilling(self) -> bool:
        """Whether a prompt is being read: steps take long then."""
        return any(sequence.is_prefilling for _, sequence, _ in self._turns)

    def add(self, number: int, request: Request) -> None:
        """Take a request; its events come from `turn`: Prefilled (several), Token (several), Finished (once, last).

        Raises:
            EngineError: an empty prompt, a foreign token id, or more tokens than the context holds.
        """
        self._waiting.append((number, request, self._check(request)))

    def turn(self) -> Iterator[tuple[int, Event]]:
        """A step of the sequence whose turn it is; yields events, each with its request's number.

        Raises:
            RingError: a rank is lost.
        """
        while self._waiting and len(self._turns) < MAX_SEQUENCES:
            number, request, max_tokens = self._waiting.popleft()
            sequence = self._begin(number, request, max_tokens)
            self._turns.append((number, sequence, sequence.run(self._shelf)))
        number, sequence, steps = self._turns.popleft()
        for event in steps:
            if event is None:
                self._turns.append((number, sequence, steps))
                return
            yield number, event

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer one request; breaking off is allowed on a single rank, the cache keeps what was computed."""
        self.add(0, request)
        try:
            while not self.is_idle:
                for _, event in self.turn():
                    yield event
        finally:
            self._waiting.clear()
            while self._turns:
                self._turns.popleft()[2].close()

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

    def clear(self) -> None:
        """Forget what was kept for later requests."""
        self._shelf.clear()

    def _begin(self, number: int, request: Request, max_tokens: int) -> Sequence:
        sampler = make_sampler(request.sampling, self._model.config.vocab_size)
        return Sequence(
            self._steps,
            request,
            max_tokens,
            seeded(sampler, self._seed(request.sampling)),
            is_cancelled=lambda: self._is_leader and self._is_cancelled(number),
            hear=self._hear,
            chunk=self._prefill_chunk,
            speculate=self._speculate,
        )

    @property
    def _is_leader(self) -> bool:
        return self._steps.exchange is None or self._steps.exchange.is_leader

    def _hear(self, said: Said) -> None:
        self._commands = said.commands

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
        seed, exchange = sampling.seed, self._steps.exchange
        if seed is None and sampling.temperature > 0:
            seed = random.getrandbits(24)  # as many bits as a float32 sum keeps
            if exchange is not None and not isinstance(exchange, PipelineExchange):  # there the leader alone draws
                mine = mx.array([float(seed if exchange.is_leader else 0)])
                seed = int(cast(float, exchange.group.sum(mine).item()))
        return seed

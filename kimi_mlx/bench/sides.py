"""The sides of a benchmark. Each holds a loaded model, runs batches of requests, and is idle in between."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from kimi_mlx.engine.events import Finished, Statistics, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError
from kimi_mlx.parallel.all_reduce_choice import AllReduceChoice
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import Session


@dataclass(frozen=True)
class RequestBatch:
    """Concurrent requests.

    Args:
        requests: at least one request.
        depth: number of leading tokens, equal in all requests, that are put into the cache before the clock starts.
    """

    requests: tuple[Request, ...]
    depth: int = 0

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens in the cache before the clock starts."""
        return self.requests[0].prompt[: self.depth]


@dataclass(frozen=True)
class TimedAnswer:
    """The answer to a request.

    Args:
        ids: new tokens.
        statistics: statistics by the clock of the side's first process.
        arrivals_s: time from the start of the batch to the arrival of each token here, by this process's clock.
    """

    ids: tuple[int, ...]
    statistics: Statistics
    arrivals_s: tuple[float, ...]


@dataclass(frozen=True)
class BatchResult:
    """The answers to a batch.

    Args:
        answers: answers in the order of the requests.
        started_at: start of the batch, by time.perf_counter.
        peak_memory_bytes: peak memory of each rank since then, as counted by MLX.
    """

    answers: tuple[TimedAnswer, ...]
    started_at: float
    peak_memory_bytes: tuple[int, ...]

    @property
    def wall_s(self) -> float:
        """Time until the last token."""
        return max(answer.arrivals_s[-1] for answer in self.answers)


class Side(Protocol):
    """A loaded model with a name.

    Args:
        name: name of the side.
        not_batched_because: reason why requests of a batch run one after another; None if they run together.
    """

    name: str
    not_batched_because: str | None

    def run(self, batch: RequestBatch) -> BatchResult:
        """Run a batch with only its prefix in the cache; return when all ranks are idle."""
        ...


MAX_KEPT_RUNS = 8
"""Runs after which caches are emptied although the next one has the same prefix, so that old ones do not pile up."""


class SessionSide:
    """kimi-mlx, through the session that all commands use.

    Args:
        name: name of the side.
        session: the session.
        other_bytes: MLX's memory in this process that belongs to another side.
    """

    def __init__(self, name: str, session: Session, other_bytes: int = 0):
        self.name = name
        self._session, self._other_bytes = session, other_bytes
        self._ring = session if isinstance(session, RingSession) else None
        self.not_batched_because: str | None = None
        self._prefix: tuple[int, ...] = ()
        self._num_kept_runs = 0

    @property
    def all_reduce(self) -> AllReduceChoice | None:
        """The all-reduce that its ranks use; None for one process."""
        return None if self._ring is None else self._ring.all_reduce

    def run(self, batch: RequestBatch) -> BatchResult:
        """Run a batch, one thread per request."""
        self._fill_cache(batch)
        started = time.perf_counter()
        answers = self._run_concurrently(batch.requests, started)
        own_peak = [max(answer.statistics.peak_memory_bytes for answer in answers) - self._other_bytes]
        return BatchResult(tuple(answers), started, tuple(self._ring.peak_memory_bytes if self._ring else own_peak))

    def _fill_cache(self, batch: RequestBatch) -> None:
        """Put the prefix into the cache, as the sequence that was used last; reuse that of the last batch."""
        self._num_kept_runs += 1
        if not batch.depth or batch.prefix != self._prefix or self._num_kept_runs > MAX_KEPT_RUNS:
            self._session.reset()
            self._prefix, self._num_kept_runs = batch.prefix, 0
        if batch.depth:
            self._run_one(replace(batch.requests[0], prompt=batch.prefix, max_tokens=1, images=()), time.perf_counter())

    def _run_concurrently(self, requests: Sequence[Request], started: float) -> list[TimedAnswer]:
        with ThreadPoolExecutor(len(requests)) as pool:
            try:
                futures = [pool.submit(self._run_one, request, started) for request in requests]
                return [future.result() for future in futures]
            except BaseException:  # including an interrupt: the pool waits for its threads
                self._session.cancel_all()
                raise

    def _run_one(self, request: Request, started: float) -> TimedAnswer:
        ids: list[int] = []
        arrivals: list[float] = []
        for event in self._session.generate(request):
            if isinstance(event, Token):
                ids.append(event.id)
                arrivals.append(time.perf_counter() - started)
            elif isinstance(event, Finished) and ids:
                return TimedAnswer(tuple(ids), event.statistics, tuple(arrivals))
        raise EngineError("the session ended without a result")

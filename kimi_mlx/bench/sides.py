"""The sides of a benchmark: each holds a loaded model and runs a batch of requests when told, idle in between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from kimi_mlx.engine.request import Finished, Request, Statistics, Token
from kimi_mlx.errors import EngineError
from kimi_mlx.parallel.sum_choice import SumChoice
from kimi_mlx.session.open import open_session
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import LoadProgress, Session, SessionOptions


@dataclass(frozen=True)
class RequestBatch:
    """Requests that are made at the same time.

    Args:
        requests: at least one.
        depth: so many first tokens, the same in all of them, are put into the cache before the clock starts.
    """

    requests: tuple[Request, ...]
    depth: int = 0

    @property
    def prefix(self) -> tuple[int, ...]:
        """What is in the cache before."""
        return self.requests[0].prompt[: self.depth]


@dataclass(frozen=True)
class TimedAnswer:
    """What a side made of a request.

    Args:
        ids: the new tokens.
        statistics: by the clock of the side's own (first) process.
        arrivals_s: when each token reached this process, since the batch was handed over, by this process's clock.
    """

    ids: tuple[int, ...]
    statistics: Statistics
    arrivals_s: tuple[float, ...]


@dataclass(frozen=True)
class BatchResult:
    """What a side made of a batch.

    Args:
        answers: in the order of the requests.
        started_at: when the batch was handed over, by time.perf_counter.
        peak_memory_bytes: of each rank, as MLX counts it, since then.
    """

    answers: tuple[TimedAnswer, ...]
    started_at: float
    peak_memory_bytes: tuple[int, ...]

    @property
    def wall_s(self) -> float:
        """Until the last token of all."""
        return max(answer.arrivals_s[-1] for answer in self.answers)


class Side(Protocol):
    """A loaded model under a name.

    Args:
        name: of the side.
        turns: why requests of a batch run one after another; None where they run together.
    """

    name: str
    turns: str | None

    def run(self, batch: RequestBatch) -> BatchResult:
        """Run a batch, with nothing in the cache but its prefix; returns when all of its ranks are idle."""
        ...


class SessionSide:
    """kimi-mlx, through the session that all commands use."""

    def __init__(self, name: str, session: Session):
        self.name = name
        self._session = session
        self._ring = session if isinstance(session, RingSession) else None
        self.turns: str | None = "its sequences take turns, a step each"

    @property
    def sums(self) -> SumChoice | None:
        """How its ranks make sums; None for one process."""
        return None if self._ring is None else self._ring.all_reduce

    def run(self, batch: RequestBatch) -> BatchResult:
        """Run a batch, each request in a thread."""
        self._session.reset()
        if batch.depth:
            self._ask(replace(batch.requests[0], prompt=batch.prefix, max_tokens=1), time.perf_counter())
        started = time.perf_counter()
        answers = self._ask_together(batch.requests, started)
        alone = [max(answer.statistics.peak_memory_bytes for answer in answers)]
        return BatchResult(tuple(answers), started, tuple(self._ring.peak_memory_bytes if self._ring else alone))

    def _ask_together(self, requests: Sequence[Request], started: float) -> list[TimedAnswer]:
        with ThreadPoolExecutor(len(requests)) as pool:
            try:
                futures = [pool.submit(self._ask, request, started) for request in requests]
                return [future.result() for future in futures]
            except BaseException:  # an interrupt, too: the pool waits for its threads
                self._session.cancel_all()
                raise

    def _ask(self, request: Request, started: float) -> TimedAnswer:
        ids: list[int] = []
        arrivals: list[float] = []
        for event in self._session.generate(request):
            if isinstance(event, Token):
                ids.append(event.id)
                arrivals.append(time.perf_counter() - started)
            elif isinstance(event, Finished) and ids:
                return TimedAnswer(tuple(ids), event.statistics, tuple(arrivals))
        raise EngineError("the session ended without a result")


@contextlib.contextmanager
def open_kimi_mlx(options: SessionOptions, progress: LoadProgress = lambda done, total: None) -> Iterator[SessionSide]:
    """Load kimi-mlx's side: in this process, or on a ring."""
    with contextlib.closing(open_session(options, progress)) as session:
        yield SessionSide("kimi-mlx", session)

"""A session: a loaded model that answers requests, in this process or on a ring of ranks."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kimi_mlx.cluster.hosts.host import Cluster, local_cluster
from kimi_mlx.cluster.ring.watch import Limits
from kimi_mlx.engine.request import Event, Finished, Request
from kimi_mlx.errors import UsageError
from kimi_mlx.parallel.placement import normal_strategy

LoadProgress = Callable[[int, int], None]
"""Called with layers loaded and layers in all."""

RankProgress = Callable[[int, int, int], None]
"""The same, and of which rank."""

MAX_RANKS = 64

MAX_CHECK_EVERY = 250
"""Steps are numbered no further."""

MAX_DRAFT_TOKENS = 16
"""Tokens a step; more are hardly ever right, and each one that is not costs its share of the step."""

DEFAULT_CACHE_DISK_BYTES = 20 * 10**9
"""Of a prompt cache's folder, where nothing else is said: 280 k tokens of K2."""


@dataclass(frozen=True)
class SessionOptions:
    """How to run a model.

    Args:
        folder: the checkpoint; None if each host of the cluster finds it by the model's name.
        ranks: processes on this machine; 1 runs in this one.
        dtype: of the computation; None chooses.
        strategy: how ranks share the model.
        has_sampling: whether answers will be sampled; mlx-lm's samplers are imported then while the weights load.
        model: its name, for hosts.
        cluster: where the ranks run; None for this machine.
        max_restarts: how often a lost ring is started again before it is given up.
        timeouts: how long things may take on a ring.
        speculate: tokens drafted a step at most; 0 drafts none.
        check_every: ranks compare what they have every so many steps; 0 never.
        fast_sync: whether processes on this machine have MLX's fast fence.
        cache_dir: where each host keeps its prompt cache on disk; None keeps it in memory only.
        cache_disk_bytes: of all that is in it, on each host.
        cache_memory_bytes: of each rank, for the caches of all conversations; None for what is free.
    """

    folder: Path | None
    ranks: int = 1
    dtype: str | None = None
    strategy: str = "hybrid"
    has_sampling: bool = False
    model: str | None = None
    cluster: Cluster | None = None
    max_restarts: int = 3
    timeouts: Limits = field(default_factory=Limits)
    speculate: int = 0
    check_every: int = 0
    fast_sync: bool = False
    cache_dir: Path | None = None
    cache_disk_bytes: int = DEFAULT_CACHE_DISK_BYTES
    cache_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        """Check the request_id of ranks and the strategy, which is written the normal way from here on."""
        if not 1 <= self.ranks <= MAX_RANKS:
            raise UsageError(f"{self.ranks} ranks are not between 1 and {MAX_RANKS}")
        if not 0 <= self.speculate <= MAX_DRAFT_TOKENS:
            raise UsageError(
                f"{self.speculate} tokens cannot be drafted a step", hint=f"--speculate 0 to {MAX_DRAFT_TOKENS}"
            )
        if not 0 <= self.check_every <= MAX_CHECK_EVERY:
            raise UsageError(
                f"ranks cannot compare every {self.check_every} steps", hint=f"--check-every 0 to {MAX_CHECK_EVERY}"
            )
        ranks = self.ranks if self.cluster is None else self.cluster.size
        object.__setattr__(self, "strategy", normal_strategy(self.strategy, ranks))

    @property
    def effective_cluster(self) -> Cluster:
        """Where the ranks run."""
        return self.cluster or local_cluster(self.ranks, self.fast_sync)

    @property
    def checkpoint(self) -> Path:
        """The folder, which is there without a cluster."""
        assert self.folder is not None
        return self.folder


@dataclass(frozen=True)
class SessionStatus:
    """A session's state.

    Args:
        is_up: whether requests are being answered, or would be.
        reason: why not.
        active: requests in the engine's batch.
        waiting: requests that it has not begun.
        last_step_age_s: how long ago a step ended; None if none has yet.
        restarts: how often the ring was started again.
        cached_tokens: in the caches of all conversations, as the last answer left them.
    """

    is_up: bool
    reason: str | None = None
    active: int = 0
    waiting: int = 0
    last_step_age_s: float | None = None
    restarts: int = 0
    cached_tokens: int = 0


EventCallback = Callable[[Event | BaseException], None]
"""Given the events of an answer, from another thread; the last is Finished, or the error that ends it."""


class Session(Protocol):
    """A loaded model; whoever opens one closes it (contextlib.closing)."""

    @property
    def context(self) -> int:
        """Tokens that a sequence may have: what the model, and the memory for its cache, hold."""
        ...

    def submit(self, request: Request, on_event: EventCallback) -> int:
        """Answer a request; returns its request_id at once. An error may be delivered before that."""
        ...

    def cancel(self, request_id: int) -> None:
        """Ask a request to stop soon; its Finished says `cancelled`. One that has ended is left alone."""
        ...

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; the last event is Finished. May be called from several threads; breaking off cancels."""
        ...

    def cancel_all(self) -> None:
        """Ask the running requests to stop soon; safe from a signal handler. Their Finished say `cancelled`."""
        ...

    def status(self) -> SessionStatus:
        """How it is getting on; at once, from any thread."""
        ...

    def reset(self) -> None:
        """Forget the conversation's cache."""
        ...

    def close(self) -> None:
        """Free the model and end its processes."""
        ...


def stream_events(session: Session, request: Request) -> Iterator[Event]:
    """Answer a request where it is asked; breaking off the iteration cancels it.

    Raises:
        KimiMlxError: it cannot be served, or the session has failed.
    """
    events = queue.SimpleQueue[Event | BaseException]()
    request_id = session.submit(request, events.put)
    is_over = False
    try:
        while not is_over:
            event = events.get()
            is_over = isinstance(event, Finished | BaseException)
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        if not is_over:
            session.cancel(request_id)

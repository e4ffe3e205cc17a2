"""The protocol of sessions, their options and status, and answering in the calling thread."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kimi_mlx.cluster.hosts.host import Cluster, local_cluster
from kimi_mlx.cluster.ring.watch import RankActivity, RingTimeouts
from kimi_mlx.engine.batch_sizes import NO_STEPS, BatchSizes
from kimi_mlx.engine.events import Event, Finished, Statistics
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError, UsageError
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.parallel.placement import normalize_strategy
from kimi_mlx.sizing.expert_memory import AUTO, ExpertMemory

if TYPE_CHECKING:
    from kimi_mlx.engine.prompt_cache.usage import CacheUsage
    from kimi_mlx.sizing.experts import ExpertBudget

LoadProgress = Callable[[int, int], None]
"""Callback with the number of layers loaded and the number of layers."""

RankProgress = Callable[[int, int, int], None]
"""Callback with the number of layers loaded, the number of layers, and the rank."""

MAX_RANKS = 64

MAX_CHECK_EVERY = 250
"""Longer intervals are not possible: step numbers wrap around at parallel.communicator.SEQUENCE_MODULUS."""

FAST_SYNC_CHECK_EVERY = 16
"""Number of steps between comparisons with the fast fence, which may deliver stale data, unless another is set."""

MAX_DRAFT_TOKENS = 16
"""Maximum number of draft tokens per step. Longer drafts are rarely accepted, and each rejected token costs time."""

DEFAULT_DRAFT_TOKENS = 7
"""Maximum number of draft tokens per step with a draft model, unless another is set."""

DEFAULT_CACHE_DISK_BYTES = 20 * 10**9
"""Default size limit of a prompt cache's folder: 280 k tokens of K2."""


@dataclass(frozen=True)
class SessionOptions:
    """The model of a session, and options for running it.

    Args:
        folder: folder of the checkpoint; None if each host of the cluster looks it up by the model's name.
        ranks: number of processes on this machine; 1 runs the model in this process.
        dtype: type to compute in; None uses the default of kimi_mlx.runtime.load.compute_dtype.
        strategy: split of the model over the ranks.
        model: name of the model, by which the hosts look it up.
        cluster: hosts of the ranks; None runs all ranks on this machine.
        max_restarts: maximum number of restarts of a lost ring without progress.
        timeouts: timeouts of a ring.
        speculate: maximum number of draft tokens per step; 0 turns drafts off, also those of a draft model; None is
            the default: DEFAULT_DRAFT_TOKENS with a draft model, else 0.
        draft: folder of the draft model, on the host of rank 0; None for drafts by prompt lookup alone.
        draft_name: name of the draft model, by which the host of rank 0 looks it up if there is no `draft`.
        check_every: number of steps between comparisons of the ranks' results; 0 turns them off, but with
            `fast_sync` they stay on.
        fast_sync: True to use MLX's fast synchronisation between GPU and network on this machine.
        cache_dir: folder of each host's prompt cache on disk; None keeps it in memory only.
        cache_disk_bytes: size limit of that folder, per host.
        cache_memory_bytes: memory limit of the KV caches, per rank; None allows all free memory.
        expert_memory: memory for routed experts, per rank; the others are read from the SSD.
    """

    folder: Path | None
    ranks: int = 1
    dtype: str | None = None
    strategy: str = "hybrid"
    model: str | None = None
    cluster: Cluster | None = None
    max_restarts: int = 3
    timeouts: RingTimeouts = field(default_factory=RingTimeouts)
    speculate: int | None = None
    draft: Path | None = None
    draft_name: str | None = None
    check_every: int = 0
    fast_sync: bool = False
    cache_dir: Path | None = None
    cache_disk_bytes: int = DEFAULT_CACHE_DISK_BYTES
    cache_memory_bytes: int | None = None
    expert_memory: ExpertMemory = AUTO

    def __post_init__(self) -> None:
        """Check the numbers, and normalise the strategy."""
        if not 1 <= self.ranks <= MAX_RANKS:
            raise UsageError(f"{self.ranks} ranks are not between 1 and {MAX_RANKS}")
        if self.speculate is not None and not 0 <= self.speculate <= MAX_DRAFT_TOKENS:
            raise UsageError(
                f"{self.speculate} draft tokens per step are not between 0 and {MAX_DRAFT_TOKENS}",
                hint=f"use `--speculate` with 0 to {MAX_DRAFT_TOKENS}",
            )
        if self.speculate == 0:
            object.__setattr__(self, "draft", None)
            object.__setattr__(self, "draft_name", None)
        if not 0 <= self.check_every <= MAX_CHECK_EVERY:
            raise UsageError(
                f"a check every {self.check_every} steps is not between 0 and {MAX_CHECK_EVERY}",
                hint=f"use `--check-every` with 0 to {MAX_CHECK_EVERY}",
            )
        if not self.check_every and self.effective_cluster.hostfile.has_fast_sync:
            object.__setattr__(self, "check_every", FAST_SYNC_CHECK_EVERY)
        ranks = self.ranks if self.cluster is None else self.cluster.size
        object.__setattr__(self, "strategy", normalize_strategy(self.strategy, ranks))

    @property
    def has_draft_model(self) -> bool:
        """Whether there is a draft model."""
        return self.draft is not None or self.draft_name is not None

    @property
    def max_drafted(self) -> int:
        """Maximum number of draft tokens per step; 0 without drafts."""
        return (DEFAULT_DRAFT_TOKENS if self.has_draft_model else 0) if self.speculate is None else self.speculate

    @property
    def effective_cluster(self) -> Cluster:
        """Hosts of the ranks."""
        return self.cluster or local_cluster(self.ranks, self.fast_sync)

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint; it must be set."""
        assert self.folder is not None
        return self.folder


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank, as MLX counts it; None where it is not known.

    Args:
        memory_bytes: memory in use once the model is loaded: the weights, and buffers of the warm-up.
        free_bytes: memory that MLX could still use then.
        peak_memory_bytes: peak memory at the end of the last answer; None before the first.
        expert_budget: memory for routed experts; None if all ranks keep all of them in memory.
    """

    memory_bytes: int | None = None
    free_bytes: int | None = None
    peak_memory_bytes: int | None = None
    expert_budget: ExpertBudget | None = None


@dataclass(frozen=True)
class DraftStatus:
    """Status of drafts.

    Args:
        drafted_tokens: number of draft tokens that the model has verified.
        accepted_tokens: number of them that were accepted.
        off_reason: reason why nothing is drafted now; None while drafts are on. For a ring, at the last answer's end.
    """

    drafted_tokens: int = 0
    accepted_tokens: int = 0
    off_reason: str | None = None

    def after(self, answer: Statistics) -> DraftStatus:
        """Return the status after an answer."""
        return DraftStatus(
            self.drafted_tokens + answer.drafted_tokens,
            self.accepted_tokens + answer.accepted_tokens,
            answer.drafts_off,
        )


@dataclass(frozen=True)
class Restart:
    """A restart of a lost ring.

    Args:
        at: Unix time in seconds of the loss.
        reason: reason of the loss, as text.
        downtime_s: seconds until the ring was up again; None while it is not.
    """

    at: float
    reason: str
    downtime_s: float | None = None


@dataclass(frozen=True)
class SessionStatus:
    """Status of a session.

    Args:
        is_up: True if requests are being answered, or would be.
        reason: reason for not being up.
        active: number of requests in the engine's batch.
        waiting: number of requests that have not started.
        last_step_age_s: seconds since the last step ended; None before the first step.
        restarts: number of restarts of the ring.
        cached_tokens: number of tokens in all KV caches; for a ring, after the last answer.
        memory: memory of each rank; empty if it is not known.
        restart_log: last restarts of the ring, the newest last.
        activity: activity of each rank of a ring; empty without ranks.
        batch_sizes: number of steps by the number of their sequences; for a ring, after the last answer.
        all_reduce: how the ranks add their parts, as text; None if nothing is added or it was not measured.
        cache_usage: use of the prompt cache by each rank since the session was opened; for a ring, after the last
            answer. Empty if it is not known.
        drafts: status of drafts; None if they are not enabled.
        experts: counters of the experts that a rank reads from its disk, by rank, since the session was opened; for a
            ring, after the last answer. Without the ranks that have all experts in memory.
    """

    is_up: bool
    reason: str | None = None
    active: int = 0
    waiting: int = 0
    last_step_age_s: float | None = None
    restarts: int = 0
    cached_tokens: int = 0
    memory: tuple[RankMemory, ...] = ()
    restart_log: tuple[Restart, ...] = ()
    activity: tuple[RankActivity, ...] = ()
    batch_sizes: BatchSizes = NO_STEPS
    all_reduce: str | None = None
    cache_usage: tuple[CacheUsage, ...] = ()
    drafts: DraftStatus | None = None
    experts: Mapping[int, ExpertStats] = field(default_factory=dict[int, ExpertStats])


EventCallback = Callable[[Event | BaseException], None]
"""Callback for the events of an answer, called from another thread. The last event is Finished, or an exception."""


class Session(Protocol):
    """A loaded model that answers requests. Close it after use (contextlib.closing)."""

    @property
    def context(self) -> int:
        """Maximum number of tokens of a sequence, limited by the model and by the memory for its KV cache."""
        ...

    @property
    def image_error(self) -> EngineError | None:
        """Error for requests with images if the model does not see images, with reason and remedy; None if it does."""
        ...

    def submit(self, request: Request, on_event: EventCallback) -> int:
        """Start to answer a request; return its id at once. An error may be delivered before this returns."""
        ...

    def cancel(self, request_id: int) -> None:
        """Cancel a request; its finish reason is `cancelled`. A finished request is left alone."""
        ...

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; the last event is Finished. Closing the iterator cancels it. Safe from several threads."""
        ...

    def cancel_all(self) -> None:
        """Cancel all unfinished requests. Safe in a signal handler."""
        ...

    def status(self) -> SessionStatus:
        """Return the current status without waiting. Safe from any thread."""
        ...

    def reset(self) -> None:
        """Drop the KV caches of finished requests."""
        ...

    def close(self) -> None:
        """Free the model and end its processes."""
        ...


def stream_events(session: Session, request: Request) -> Iterator[Event]:
    """Answer a request in the calling thread. Closing the iterator cancels it.

    Raises:
        KimiMlxError: the request is refused, or the session has failed.
    """
    events = queue.SimpleQueue[Event | BaseException]()
    request_id = session.submit(request, events.put)
    is_finished = False
    try:
        while not is_finished:
            event = events.get()
            is_finished = isinstance(event, Finished | BaseException)
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        if not is_finished:
            session.cancel(request_id)

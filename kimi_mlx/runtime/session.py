"""A session: a loaded model that answers requests, in this process or on a ring of ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kimi_mlx.cluster.hosts import Cluster, local_cluster
from kimi_mlx.cluster.launch import FAST_SYNC
from kimi_mlx.cluster.watch import Limits
from kimi_mlx.engine.request import Event, Request
from kimi_mlx.errors import UsageError

LoadProgress = Callable[[int, int], None]
"""Called with layers loaded and layers in all."""

RankProgress = Callable[[int, int, int], None]
"""The same, and of which rank."""

MAX_RANKS = 64


@dataclass(frozen=True)
class SessionOptions:
    """How to run a model.

    Args:
        folder: the checkpoint; None if each host of the cluster finds it by the model's name.
        ranks: processes on this machine; 1 runs in this one.
        dtype: of the computation; None chooses.
        strategy: how ranks share the model.
        samples: whether answers will be sampled; mlx-lm's samplers are imported then while the weights load.
        model: its name, for hosts.
        cluster: where the ranks run; None for this machine.
        restarts: how often a lost ring is started again before it is given up.
        limits: how long things may take on a ring.
        fast_sync: whether processes on this machine have MLX's fast fence.
    """

    folder: Path | None
    ranks: int = 1
    dtype: str | None = None
    strategy: str = "hybrid"
    samples: bool = False
    model: str | None = None
    cluster: Cluster | None = None
    restarts: int = 3
    limits: Limits = field(default_factory=Limits)
    fast_sync: bool = False

    def __post_init__(self) -> None:
        """Check the number of ranks."""
        if not 1 <= self.ranks <= MAX_RANKS:
            raise UsageError(f"{self.ranks} ranks are not between 1 and {MAX_RANKS}")

    @property
    def where(self) -> Cluster:
        """Where the ranks run."""
        return self.cluster or local_cluster(self.ranks, self.fast_sync)

    @property
    def checkpoint(self) -> Path:
        """The folder, which is there without a cluster."""
        assert self.folder is not None
        return self.folder


class Session(Protocol):
    """A loaded model; whoever opens one closes it (contextlib.closing)."""

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; the last event is Finished. One request at a time."""
        ...

    def cancel(self) -> None:
        """Ask the running request to stop soon; safe from a signal handler. Its Finished says `cancelled`."""
        ...

    def reset(self) -> None:
        """Forget the conversation's cache."""
        ...

    def close(self) -> None:
        """Free the model and end its processes."""
        ...


class LocalSession:
    """The engine in this process."""

    def __init__(self, options: SessionOptions, progress: LoadProgress = lambda done, total: None):
        from kimi_mlx.engine.generate import Engine
        from kimi_mlx.model.config import load_config
        from kimi_mlx.runtime.load import load_share, prepare_device

        os.environ[FAST_SYNC] = str(int(options.fast_sync))  # which MLX reads when it first computes
        prepare_device(options.samples)
        model = load_share(
            options.checkpoint,
            load_config(options.checkpoint),
            options.dtype,
            progress=progress,
            strategy=options.strategy,
        )
        self._cancelled = threading.Event()
        self._engine = Engine(model, is_cancelled=self._cancelled.is_set)

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request."""
        self._cancelled.clear()
        yield from self._engine.generate(request)

    def cancel(self) -> None:
        """Ask the running request to stop."""
        self._cancelled.set()

    def reset(self) -> None:
        """Forget the conversation's cache."""
        self._engine.cache.clear()

    def close(self) -> None:
        """Free the model."""
        del self._engine


def open_session(options: SessionOptions, progress: LoadProgress = lambda done, total: None) -> Session:
    """Load a model in this process, or on a ring of local ranks if there are several."""
    if options.ranks == 1:
        return LocalSession(options, progress)
    from kimi_mlx.runtime.ring_session import RingSession

    loaded = dict.fromkeys(range(options.ranks), 0)

    def slowest(done: int, total: int, rank: int) -> None:
        loaded[rank] = done
        progress(min(loaded.values()), total)

    return RingSession(options, slowest)

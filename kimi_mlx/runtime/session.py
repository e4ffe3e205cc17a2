"""A session: a loaded model that answers requests, in this process or on a ring of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kimi_mlx.cluster.messages import Message, decode_error
from kimi_mlx.cluster.ring import SILENCE_LIMIT_S, LocalRing
from kimi_mlx.engine.request import Event, Finished, Prefilled, Request, Statistics, Token
from kimi_mlx.errors import KimiMlxError, UsageError

LoadProgress = Callable[[int, int], None]
"""Called with layers loaded and layers in all, of the slowest rank."""

MAX_RANKS = 64


@dataclass(frozen=True)
class SessionOptions:
    """How to run a model.

    Args:
        folder: the checkpoint.
        ranks: processes on this machine; 1 runs in this one.
        dtype: of the computation; None chooses.
        strategy: how ranks share the model.
        samples: whether answers will be sampled; mlx-lm's samplers are imported then while the weights load.
    """

    folder: Path
    ranks: int = 1
    dtype: str | None = None
    strategy: str = "hybrid"
    samples: bool = False

    def __post_init__(self) -> None:
        """Check the number of ranks."""
        if not 1 <= self.ranks <= MAX_RANKS:
            raise UsageError(f"{self.ranks} ranks are not between 1 and {MAX_RANKS}")


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

        prepare_device(options.samples)
        model = load_share(
            options.folder,
            load_config(options.folder),
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


class RingSession:
    """The engine on a ring of local ranks; this process only talks to them."""

    def __init__(
        self,
        options: SessionOptions,
        progress: LoadProgress = lambda done, total: None,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ):
        from kimi_mlx.model.config import load_config
        from kimi_mlx.runtime.load import check_ranks

        # fails before anything is started
        check_ranks(options.folder, load_config(options.folder), options.ranks, options.strategy)
        self._ring = LocalRing(options.ranks, silence_limit_s)
        self._number = 0
        self._waiting: set[int] = set()  # ranks that have not finished the request
        loaded = dict.fromkeys(range(options.ranks), 0)
        waiting = set(loaded)
        try:
            self._ring.start(
                folder=str(options.folder),
                dtype=options.dtype,
                strategy=options.strategy,
                samples=options.samples,
            )
            for rank, message in self._ring.messages():
                if message["kind"] == "loading":
                    loaded[rank] = message["done"]
                    progress(min(loaded.values()), message["total"])
                elif message["kind"] == "ready":
                    waiting.discard(rank)
                if not waiting:
                    break
            self._ring.remove_hostfile()
        except BaseException:
            self._ring.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return self._ring.pids

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; breaking off the iteration cancels it.

        Raises:
            RingError: a rank was lost; the session is closed then.
        """
        for _ in self._events():  # the rest of a request that was broken off
            pass
        self._number += 1
        self._ring.send("request", number=self._number, request=request.to_dict())
        self._waiting = set(range(self._ring.world_size))
        try:
            yield from self._events()
        finally:
            if self._waiting:
                self.cancel()

    def _events(self) -> Iterator[Event]:
        """The leader's events, until every rank has finished the request or refused it."""
        last: Event | None = None
        refusal: KimiMlxError | None = None
        messages = self._messages()
        while self._waiting:
            rank, message = next(messages)
            if message["kind"] in ("finished", "refused"):
                self._waiting.discard(rank)
            if rank != 0:
                continue
            if message["kind"] == "refused":
                refusal = decode_error(message)
            elif isinstance(event := _to_event(message), Finished):
                last = event
            elif event is not None:
                yield event
        if refusal is not None:
            raise refusal
        if last is not None:
            yield last

    def _messages(self) -> Iterator[tuple[int, Message]]:
        """The ring's messages; whatever ends them ends the ring."""
        try:
            yield from self._ring.messages()
        except KimiMlxError:
            self._waiting = set()
            self.close()
            raise

    def cancel(self) -> None:
        """Ask the running request to stop."""
        if self._waiting:
            self._ring.send_leader("cancel", number=self._number)

    def reset(self) -> None:
        """Forget the conversation's cache on every rank."""
        self._ring.send("reset")

    def close(self) -> None:
        """End the ranks."""
        self._ring.close()


def open_session(options: SessionOptions, progress: LoadProgress = lambda done, total: None) -> Session:
    """Load a model in this process, or on a ring of local ranks if there are several."""
    return LocalSession(options, progress) if options.ranks == 1 else RingSession(options, progress)


def _to_event(message: Message) -> Event | None:
    kind = message["kind"]
    if kind == "prefilled":
        return Prefilled(message["done"], message["total"])
    if kind == "token":
        return Token(message["id"])
    if kind == "finished":
        return Finished(message["reason"], Statistics.from_dict(message["statistics"]))
    return None

"""The sides of a benchmark: each holds a loaded model and runs a request when told, idle in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

from kimi_mlx.engine.request import Finished, Request, Statistics, Token
from kimi_mlx.errors import EngineError
from kimi_mlx.parallel.sum_choice import SumChoice
from kimi_mlx.runtime.ring_session import RingSession
from kimi_mlx.runtime.session import LoadProgress, Session, SessionOptions, open_session


@dataclass(frozen=True)
class Answer:
    """What a side made of a request.

    Args:
        ids: the new tokens.
        statistics: as the side measured them itself; of the leader on several ranks.
    """

    ids: tuple[int, ...]
    statistics: Statistics


class Side(Protocol):
    """A loaded model under a name."""

    name: str

    def run(self, request: Request) -> Answer:
        """Answer a request from an empty cache; returns when all of its ranks are idle."""
        ...


class SessionSide:
    """kimi-mlx, through the session that all commands use."""

    def __init__(self, name: str, session: Session):
        self.name = name
        self._session = session

    @property
    def sums(self) -> SumChoice | None:
        """How its ranks make sums; None for one process."""
        return self._session.sums if isinstance(self._session, RingSession) else None

    def run(self, request: Request) -> Answer:
        """Answer a request, without the conversation's cache."""
        self._session.reset()
        ids: list[int] = []
        for event in self._session.generate(request):
            if isinstance(event, Token):
                ids.append(event.id)
            elif isinstance(event, Finished):
                return Answer(tuple(ids), event.statistics)
        raise EngineError("the session ended without a result")


@contextmanager
def open_kimi_mlx(options: SessionOptions, progress: LoadProgress = lambda done, total: None) -> Iterator[SessionSide]:
    """Load kimi-mlx's side: in this process, or on a ring."""
    with closing(open_session(options, progress)) as session:
        yield SessionSide("kimi-mlx", session)

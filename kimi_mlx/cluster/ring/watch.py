"""Watching a ring: who has fallen silent, which link has, and whether the work goes on. Pure: the time is told.

Every rank says each second what it is doing, how many steps it has made, and when it last heard from its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimi_mlx.cluster.channel.messages import HEARTBEAT_S

SUSPEND_GAP_S = 3.0
"""A gap in our own checks that shows that this process did not run."""

RESUME_GRACE_S = 5.0
"""After such a gap ranks may still tell how long they heard nothing of us."""

START_S = 60.0
"""Until a rank's first word: logging in, and importing MLX for the first time."""

JOIN_S = 20.0
"""Until all ranks are connected."""

TEST_S = 20.0
"""Then, until they have exchanged what every start exchanges."""


@dataclass(frozen=True)
class RingTimeouts:
    """How long things may take.

    Args:
        silence_s: without a word from a rank, or from one neighbour to another.
        step_s: without a token, while tokens come.
        stall_s: without a layer loaded, or a chunk of the prompt read.
    """

    silence_s: float = 10.0
    step_s: float = 10.0
    stall_s: float = 300.0


@dataclass(frozen=True)
class RingProblem:
    """What is wrong.

    Args:
        what: in words.
        rank: which one; None if it is not known.
        is_stall: all ranks are alive, and none goes on, or a link is dead.
    """

    what: str
    rank: int | None = None
    is_stall: bool = False


class RingWatch:
    """The watch over a ring that stands.

    Args:
        size: how many ranks.
        limits: of everything.
        now: seconds, of a clock that never goes back.
    """

    def __init__(self, size: int, limits: RingTimeouts, now: float):
        self._limits = limits
        self._heard = [now] * size
        self._steps = [0] * size
        self._work = ["idle"] * size
        self._links: list[Mapping[int, float]] = [{}] * size
        self._missed_from_front = [0.0] * size  # since a rank heard from us, by its own word
        self._last_step = self._last_look = self._awake = now

    def on_message(self, rank: int, message: Mapping[str, Any], now: float) -> None:
        """Take note of a message."""
        self._heard[rank] = now
        if message["kind"] != "alive":
            self._last_step = now
            return
        work, step = message.get("work", "idle"), message.get("step", 0)
        if (work, step) != (self._work[rank], self._steps[rank]):
            self._last_step = now
        self._work[rank], self._steps[rank] = work, step
        self._missed_from_front[rank] = message.get("front", 0.0)
        self._links[rank] = {int(peer): age for peer, age in message.get("links", {}).items()}

    def check(self, now: float) -> RingProblem | None:
        """What is wrong now; to be asked several times a second."""
        gap = now - self._last_look
        self._last_look = now
        if gap > SUSPEND_GAP_S:  # this process was suspended (Ctrl-Z) or the machine slept: restart all timers
            self._heard = [now] * len(self._heard)
            self._last_step = self._awake = now
        return self._silent_rank(now) or self._rank_without_front(now) or self._silent_link(now) or self._stall(now)

    def _silent_rank(self, now: float) -> RingProblem | None:
        oldest = min(range(len(self._heard)), key=lambda rank: self._heard[rank])
        silence = now - self._heard[oldest]
        if silence < self._limits.silence_s:
            return None
        return RingProblem(f"has been silent for {silence:.0f} s, the limit is {self._limits.silence_s:.0f} s", oldest)

    def _rank_without_front(self, now: float) -> RingProblem | None:
        """A rank that does not hear us, though we say a word every second: what lies between is stopped."""
        if now - self._awake < RESUME_GRACE_S:
            return None
        rank = max(range(len(self._missed_from_front)), key=lambda rank: self._missed_from_front[rank])
        if self._missed_from_front[rank] < self._limits.silence_s:
            return None
        return RingProblem(
            f"has not heard from us for {self._missed_from_front[rank]:.0f} s: its guard is stopped", rank
        )

    def _silent_link(self, now: float) -> RingProblem | None:
        """Neighbours that both talk to us but not to each other: the cable between them."""
        is_here = [now - heard < 2 * HEARTBEAT_S + 1 for heard in self._heard]
        for rank, links in enumerate(self._links):
            for peer, age in links.items():
                silence = age + now - self._heard[rank]
                if silence >= self._limits.silence_s and is_here[rank] and is_here[peer]:
                    what = f"has not heard from rank {peer} for {silence:.0f} s: the link between them is dead"
                    return RingProblem(what, rank, is_stall=True)
        return None

    def _stall(self, now: float) -> RingProblem | None:
        doing = {work for work in self._work if work != "idle"}
        if not doing:
            return None
        limit = self._limits.step_s if doing == {"decode"} else self._limits.stall_s
        if now - self._last_step < limit:
            return None
        what = f"no step of the {' and the '.join(sorted(doing))} for {limit:.0f} s, though all ranks are alive"
        return RingProblem(what, is_stall=True)

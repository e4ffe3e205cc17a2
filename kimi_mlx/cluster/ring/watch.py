"""Watch a ring: ranks that do not respond, dead links, lack of progress. Pure: the caller passes the time.

Each second every rank reports its work, its step count, and when it last received something from its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kimi_mlx.cluster.channel.messages import HEARTBEAT_S

SUSPEND_GAP_S = 3.0
"""A gap between our own checks that shows that this process was suspended."""

RESUME_GRACE_S = 5.0
"""After such a gap, ignore for this long that ranks report to have received nothing from the front."""

START_S = 60.0
"""Timeout of a rank's first message: login, and the first import of MLX."""

JOIN_S = 20.0
"""Timeout until all ranks are connected."""

TEST_S = 20.0
"""Timeout of the link test that follows."""

STREAMED_STEP_S = 60.0
"""Least timeout of a decode step if experts are read from the SSD: a token of K2 reads up to 12 GB."""

STREAMED_STALL_S = 1800.0
"""Least timeout of a chunk of a prompt then: it reads up to all experts."""


@dataclass(frozen=True)
class RingTimeouts:
    """Timeouts of a running ring.

    Args:
        silence_s: seconds without a message from a rank, or from one neighbour to another.
        step_s: seconds without a token while decoding.
        stall_s: seconds without a loaded layer, or a processed chunk of the prompt.
    """

    silence_s: float = 10.0
    step_s: float = 10.0
    stall_s: float = 300.0

    @property
    def of_streaming(self) -> RingTimeouts:
        """Timeouts of ranks that read experts from their SSDs: a slow SSD is no failure."""
        return replace(self, step_s=max(self.step_s, STREAMED_STEP_S), stall_s=max(self.stall_s, STREAMED_STALL_S))


@dataclass(frozen=True)
class RingProblem:
    """A problem of a running ring.

    Args:
        message: description; follows the name of the rank, if there is one.
        rank: rank that has the problem; None if unknown.
        is_stall: whether all ranks are alive, but there is no progress or a link is dead.
    """

    message: str
    rank: int | None = None
    is_stall: bool = False


@dataclass(frozen=True)
class RankActivity:
    """Activity of a rank, as its last heartbeat reported it.

    Args:
        work: what it does: `idle`, `load`, `prefill`, `decode` and so on.
        step: number of steps so far.
        last_message_s: seconds since its last message.
        memory_bytes: memory that MLX uses there; None before the first heartbeat.
    """

    work: str
    step: int
    last_message_s: float
    memory_bytes: int | None = None


class RingWatch:
    """Watch a ring after its start.

    Args:
        size: number of ranks.
        limits: timeouts.
        now: seconds of a monotonic clock.
    """

    def __init__(self, size: int, limits: RingTimeouts, now: float):
        self._limits = limits
        self._received_at = [now] * size
        self._steps = [0] * size
        self._work = ["idle"] * size
        self._memory: list[int | None] = [None] * size
        self._links: list[Mapping[int, float]] = [{}] * size
        self._missed_from_front = [0.0] * size  # seconds without a message from the front, as reported by each rank
        self._last_step = self._last_check = self._awake = now

    def set_limits(self, limits: RingTimeouts) -> None:
        """Change the timeouts."""
        self._limits = limits

    def on_message(self, rank: int, message: Mapping[str, Any], now: float) -> None:
        """Record a message of a rank."""
        self._received_at[rank] = now
        if message["kind"] != "alive":
            self._last_step = now
            return
        work, step = message.get("work", "idle"), message.get("step", 0)
        if (work, step) != (self._work[rank], self._steps[rank]):
            self._last_step = now
        self._work[rank], self._steps[rank] = work, step
        self._memory[rank] = message.get("memory")
        self._missed_from_front[rank] = message.get("front", 0.0)
        self._links[rank] = {int(peer): age for peer, age in message.get("links", {}).items()}

    def activity(self, now: float) -> tuple[RankActivity, ...]:
        """Return the activity of each rank. Safe from any thread."""
        return tuple(
            RankActivity(work, step, max(now - received_at, 0.0), memory)
            for work, step, received_at, memory in zip(
                self._work, self._steps, self._received_at, self._memory, strict=True
            )
        )

    def check(self, now: float) -> RingProblem | None:
        """Return the problem that the ring has now, or None. Call it several times a second."""
        gap = now - self._last_check
        self._last_check = now
        if gap > SUSPEND_GAP_S:  # this process was suspended (Ctrl-Z) or the machine slept: restart all timers
            self._received_at = [now] * len(self._received_at)
            self._last_step = self._awake = now
        return self._silent_rank(now) or self._rank_without_front(now) or self._silent_link(now) or self._stall(now)

    def _silent_rank(self, now: float) -> RingProblem | None:
        oldest = min(range(len(self._received_at)), key=lambda rank: self._received_at[rank])
        silence = now - self._received_at[oldest]
        if silence < self._limits.silence_s:
            return None
        return RingProblem(f"has not responded for {silence:.0f} s (limit {self._limits.silence_s:.0f} s)", oldest)

    def _rank_without_front(self, now: float) -> RingProblem | None:
        """Find a rank that receives nothing from the front, which sends a message per second: its guard is stopped."""
        if now - self._awake < RESUME_GRACE_S:
            return None
        rank = max(range(len(self._missed_from_front)), key=lambda rank: self._missed_from_front[rank])
        if self._missed_from_front[rank] < self._limits.silence_s:
            return None
        return RingProblem(
            f"has received nothing from the front for {self._missed_from_front[rank]:.0f} s: its guard is stopped", rank
        )

    def _silent_link(self, now: float) -> RingProblem | None:
        """Find neighbours that both respond to the front but not to each other: the cable between them is dead."""
        is_here = [now - received_at < 2 * HEARTBEAT_S + 1 for received_at in self._received_at]
        for rank, links in enumerate(self._links):
            for peer, age in links.items():
                silence = age + now - self._received_at[rank]
                if silence >= self._limits.silence_s and is_here[rank] and is_here[peer]:
                    message = (
                        f"has received nothing from rank {peer} for {silence:.0f} s: the link between them is dead"
                    )
                    return RingProblem(message, rank, is_stall=True)
        return None

    def _stall(self, now: float) -> RingProblem | None:
        busy = {work for work in self._work if work != "idle"}
        if not busy:
            return None
        limit = self._limits.step_s if busy == {"decode"} else self._limits.stall_s
        if now - self._last_step < limit:
            return None
        message = f"no progress in {' and '.join(sorted(busy))} for {limit:.0f} s, though all ranks are alive"
        return RingProblem(message, is_stall=True)

"""Activity of the server: answers in progress, and token rates of the last minutes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

INTERVAL_S = 5
"""Length of the intervals in which tokens are counted."""

NUM_INTERVALS = 60
"""Number of intervals that are kept: five minutes."""

RECENT_S = 10
"""Time that the current rate is the mean of, at most."""

SLOT_S = 0.5
"""Precision of that time."""

AnswerState = Literal["waiting", "prefill", "decode"]


@dataclass(frozen=True)
class RunningAnswer:
    """An answer in progress.

    Args:
        state: `waiting` before the engine has started it, `prefill` until its first token, then `decode`.
        age_s: seconds since the request.
        prompt_tokens: number of tokens of its prompt; 0 while it waits.
        cached_tokens: number of these that were taken from the cache.
        processed_tokens: number of prompt tokens that are in the cache now.
        generated_tokens: number of new tokens.
    """

    state: AnswerState
    age_s: float
    prompt_tokens: int
    cached_tokens: int
    processed_tokens: int
    generated_tokens: int


@dataclass
class AnswerProgress:
    """Progress of an answer, updated by the events of the engine.

    Args:
        created_at: time of the request, on the clock of time.monotonic.
    """

    created_at: float
    started_at: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    processed_tokens: int = 0

    def start(self) -> None:
        """Record that the engine has started the answer; further calls do nothing."""
        self.started_at = self.started_at or time.monotonic()

    def prefill(self, done: int, total: int) -> int:
        """Record the progress of the prompt; return the number of tokens that were computed since the last call."""
        if not self.prompt_tokens:
            self.cached_tokens = self.processed_tokens = done
        self.prompt_tokens = total
        new_tokens = max(done - self.processed_tokens, 0)
        self.processed_tokens = done
        return new_tokens

    @property
    def elapsed_s(self) -> float:
        """Seconds since the engine started the answer."""
        return 0.0 if self.started_at is None else time.monotonic() - self.started_at

    def describe(self, generated_tokens: int) -> RunningAnswer:
        """Return the progress for a status.

        Args:
            generated_tokens: number of new tokens so far.
        """
        state: AnswerState = "decode" if generated_tokens else "waiting" if self.started_at is None else "prefill"
        return RunningAnswer(
            state,
            time.monotonic() - self.created_at,
            self.prompt_tokens,
            self.cached_tokens,
            self.processed_tokens,
            generated_tokens,
        )


@dataclass(frozen=True)
class TokenRates:
    """Token counts of the last minutes, for a plot.

    Args:
        interval_s: length of an interval.
        prompt_tokens: prompt tokens computed in each complete interval, the newest last.
        completion_tokens: new tokens in each complete interval, the newest last.
        prompt_tok_per_s: mean of the last seconds, since the first tokens in them.
        completion_tok_per_s: the same for new tokens.
    """

    interval_s: int = INTERVAL_S
    prompt_tokens: tuple[int, ...] = ()
    completion_tokens: tuple[int, ...] = ()
    prompt_tok_per_s: float = 0.0
    completion_tok_per_s: float = 0.0


@dataclass
class RateCounter:
    """Counts tokens in intervals. All methods must be called in one thread.

    Args:
        clock: function that returns the time in seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _intervals: deque[list[int]] = field(default_factory=lambda: deque(maxlen=NUM_INTERVALS + 1))
    _last: int | None = None
    _slots: deque[list[float]] = field(default_factory=deque[list[float]])
    """Begin and counts of the recent half seconds with tokens."""

    def add(self, prompt: int = 0, completion: int = 0) -> None:
        """Count computed prompt tokens and new tokens now."""
        self._advance()
        self._intervals[-1][0] += prompt
        self._intervals[-1][1] += completion
        now = self.clock()
        if not self._slots or now - self._slots[-1][0] >= SLOT_S:
            self._slots.append([now, 0, 0])
        self._slots[-1][1] += prompt
        self._slots[-1][2] += completion
        self._forget(now)

    def rates(self) -> TokenRates:
        """Return the counts of the complete intervals, and the rates now."""
        self._advance()
        complete = list(self._intervals)[:-1]
        prompt, completion = (tuple(counts[kind] for counts in complete) for kind in (0, 1))
        now = self.clock()
        self._forget(now)
        recent_s = max(now - self._slots[0][0], SLOT_S) if self._slots else 1
        return TokenRates(
            prompt_tokens=prompt,
            completion_tokens=completion,
            prompt_tok_per_s=sum(slot[1] for slot in self._slots) / recent_s,
            completion_tok_per_s=sum(slot[2] for slot in self._slots) / recent_s,
        )

    def _forget(self, now: float) -> None:
        """Remove slots that are not recent."""
        while self._slots and now - self._slots[0][0] > RECENT_S:
            self._slots.popleft()

    def _advance(self) -> None:
        """Append intervals until the last one is the current one."""
        current = int(self.clock() // INTERVAL_S)
        missing = 1 if self._last is None else min(current - self._last, NUM_INTERVALS + 1)
        self._intervals.extend([0, 0] for _ in range(missing))
        self._last = current

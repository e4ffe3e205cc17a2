"""Times of steps by their number of tokens: measured at the start, and while the engine runs."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

MEASURED_TOKENS = (1, 2, 4, 8)
"""Numbers of tokens whose steps are measured at the start."""

DEFAULT_TIMES: Mapping[int, float] = {1: 1.0, 8: 2.0}
"""Relative times of steps, used until some are measured."""

NUM_SAMPLES = 9
"""Number of recent samples. Their median is used, so a few slow steps do not matter."""

MIN_SAMPLES = 2
"""With fewer samples, the median includes the expected time as one more sample."""

DEPTH_STEP = 1024
"""Sequences shorter than this have depth 0; each doubling of the length adds 1."""


@dataclass(frozen=True)
class Load:
    """The conditions that the time of a step depends on, besides its number of tokens.

    Args:
        sequences: number of sequences in the step.
        depth: class of the length of the longest one, logarithmic (DEPTH_STEP).
        others_decode: whether other batches are in flight.
    """

    sequences: int
    depth: int
    others_decode: bool

    @classmethod
    def of(cls, lengths: list[int], others_decode: bool) -> Load:
        """Return the load of sequences of these lengths."""
        return cls(len(lengths), (max(lengths) // DEPTH_STEP).bit_length(), others_decode)


@dataclass
class _Times:
    """Recent times of steps of one size."""

    samples: deque[float] = field(default_factory=lambda: deque[float](maxlen=NUM_SAMPLES))
    median: float = 0.0

    def add(self, seconds: float) -> None:
        self.samples.append(seconds)
        self.median = statistics.median(self.samples)


class StepTimes:
    """Times of steps.

    For each load, only some numbers of tokens were measured. The times of the others are estimated with the ratios of
    the times at the start.

    Args:
        start_times: seconds by number of tokens, of one sequence, measured at the start; at least two.
    """

    def __init__(self, start_times: Mapping[int, float] = DEFAULT_TIMES):
        self._start_times = sorted(start_times.items())
        self._loads: dict[Load, dict[int, _Times]] = {}
        self._last_scale = 1.0

    def set_start_times(self, start_times: Mapping[int, float]) -> None:
        """Replace the times measured at the start."""
        self._start_times = sorted(start_times.items())

    def add(self, load: Load, tokens: int, seconds: float) -> None:
        """Add the time of a step.

        Args:
            load: load of the step.
            tokens: number of its tokens; without drafts the number of sequences.
            seconds: time between its results and those of the step before.
        """
        self._loads.setdefault(load, {}).setdefault(tokens, _Times()).add(seconds)
        self._last_scale = seconds / self._expected(tokens)

    def num_samples(self, load: Load, tokens: int) -> int:
        """Return the number of recent samples of such steps."""
        times = self._loads.get(load, {}).get(tokens)
        return 0 if times is None else len(times.samples)

    def seconds(self, load: Load, tokens: int) -> float:
        """Return the expected time of a step. With drafts it is at least that without, whatever was measured."""
        seconds = self._seconds(load, tokens)
        return seconds if tokens <= load.sequences else max(seconds, self._seconds(load, load.sequences))

    def _seconds(self, load: Load, tokens: int) -> float:
        known = self._loads.get(load)
        if not known:
            return self._expected(tokens) * self._last_scale
        times = known.get(tokens)
        if times is not None and len(times.samples) >= MIN_SAMPLES:
            return times.median
        others = known.keys() - {tokens}
        if others:
            nearest = min(others, key=lambda other: abs(other - tokens))
            expected = known[nearest].median * self._expected(tokens) / self._expected(nearest)
        else:
            expected = self._expected(tokens) * self._last_scale
        if times is None:
            return expected
        return statistics.median([*times.samples, expected])

    def ratio(self, load: Load, tokens: int) -> float:
        """Return the time of a step, relative to one without drafts."""
        return self.seconds(load, tokens) / self.seconds(load, load.sequences)

    def _expected(self, tokens: int) -> float:
        """Return the time at the start: interpolated linearly, and extrapolated after the largest measured number."""
        points = self._start_times
        upper = next((index for index, (number, _) in enumerate(points) if number >= tokens), len(points) - 1)
        (a, a_s), (b, b_s) = points[max(upper, 1) - 1], points[max(upper, 1)]
        return max(a_s + (b_s - a_s) * (tokens - a) / (b - a), points[0][1])


class StepClock:
    """Measures the time between the results of consecutive steps of a batch.

    Args:
        times: receives the times.
    """

    def __init__(self, times: StepTimes):
        self._times = times
        self._last: tuple[bool, float] | None = None
        self._excluded_s = 0.0

    def exclude(self, seconds: float) -> None:
        """Exclude seconds that are counted elsewhere from the time since the last results."""
        self._excluded_s += seconds

    def on_results(self, load: Load | None, tokens: int, with_drafts: bool) -> None:
        """Record that the results of a step are available now.

        Args:
            load: load of the step; None if it had chunks of prompts.
            tokens: number of tokens of the step.
            with_drafts: whether the step was launched after the results of the step before were read.
        """
        now = time.perf_counter()
        if self._last is not None and load is not None:
            had_drafts, since = self._last
            # A step after a change of the mode, or one with an empty draft, is typical of neither mode.
            if had_drafts == with_drafts and with_drafts == (tokens > load.sequences):
                self._times.add(load, tokens, now - since - self._excluded_s)
        self._last, self._excluded_s = (with_drafts, now), 0.0

    def stop(self) -> None:
        """Do not count the time until the next results."""
        self._last = None

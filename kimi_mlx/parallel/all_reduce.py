"""How sums over the ranks are made: measured at the start on the sizes that the model sends; rank 0 decides for all.

Ranks that make a sum in different ways wait for each other for ever. So all of them do the same number of collectives
here, and rank 0 says in one of these how it goes on.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from zlib import crc32

import mlx.core as mx
import numpy as np

from kimi_mlx.parallel.all_reduce_choice import NO_LIMIT, AllReduceChoice, AllReduceTiming, gather_limit
from kimi_mlx.parallel.group import Group, MlxGroup

TOKENS = (1, 8, 64, 512)
"""In a message: one sequence's decode, some together, and up to a chunk of a prompt."""

RUN = 4
"""Sums in a row are timed together: with one alone a rank that comes later finds all there, and seems to be fast."""

ROUNDS, FEW_ROUNDS = 7, 2
"""How many such rows a size gets, and how many on a slow link."""

SIZE_S = 0.05
"""From which time on there are fewer rounds."""

LIMIT_S = 1.5
"""What would take longer is left out: rounds after the warm-up, and larger sizes."""

Times = tuple[float, float]
"""Of a sum that is gathered and of all_sum, in seconds."""


def tune_all_reduce(group: Group, width: int, dtype: mx.Dtype) -> AllReduceChoice | None:
    """Measure, and let the group make its sums so from now on; a call on every rank at once.

    Args:
        group: the ranks.
        width: values of a token.
        dtype: of the values.

    Returns:
        On rank 0 the choice; None on the others, and for a group that has nothing to choose.
    """
    if not isinstance(group, MlxGroup):
        return None
    _tell(group, 0)  # all are here
    begin = time.perf_counter()
    sizes: list[tuple[int, int, int]] = []
    medians: list[Times] = []
    checksums: list[int] = []
    is_next = True
    for tokens in TOKENS:
        if not is_next:
            break
        x = _values(tokens, width, group.rank).astype(dtype)
        checksums.append(_checksum(group.all_sum(x)))
        warm = _time_both(group, x, 0, 1)
        elapsed_s = time.perf_counter() - begin
        rounds, is_next = _tell(group, *_plan(warm, elapsed_s))
        times = [_time_both(group, x, turn, RUN) for turn in range(rounds)] or [warm]
        gather_s, all_sum_s = (statistics.median(each) for each in zip(*times, strict=True))
        medians.append((gather_s, all_sum_s))
        sizes.append((tokens, x.nbytes, len(times)))
    means: list[list[float]] = np.array(group.gather(mx.array(medians))).mean(axis=0).tolist()
    timings = [
        AllReduceTiming(tokens, size_bytes, gather_s, all_sum_s, rounds)
        for (tokens, size_bytes, rounds), (gather_s, all_sum_s) in zip(sizes, means, strict=True)
    ]
    everybodys = np.array(group.gather(mx.array(checksums, mx.uint32)))
    is_same_bits = bool((everybodys == everybodys[0]).all())
    limit = gather_limit(timings, len(timings) == len(TOKENS)) if is_same_bits else NO_LIMIT
    [group.gather_limit_bytes] = _tell(group, limit)
    seconds = time.perf_counter() - begin
    return AllReduceChoice(group.gather_limit_bytes, tuple(timings), is_same_bits, seconds) if group.rank == 0 else None


def _values(tokens: int, width: int, rank: int) -> mx.array:
    """Numbers whose sum depends on the order in which it is made."""
    numbers = mx.arange(tokens * width, dtype=mx.int32) % 1009 - 504
    return (numbers * (0.1234567 + 0.7654321 * rank)).reshape(tokens, width)


def _time_both(group: MlxGroup, x: mx.array, turn: int, run: int) -> Times:
    """How long a sum takes in each way, as a model has it: of what was just computed, and computed with at once.

    Args:
        group: the ranks.
        x: what to sum.
        turn: even or odd, by which the order of the two changes.
        run: how many sums in a row, each of what came of the one before.
    """
    ways = (group.sum_gathered, group.all_sum)
    seconds = [0.0, 0.0]
    for number in (0, 1) if turn % 2 == 0 else (1, 0):
        begin = time.perf_counter()
        total = x
        for _ in range(run):
            total = ways[number](total + 0) * (1 / group.size)
        mx.eval(total)
        seconds[number] = (time.perf_counter() - begin) / run
    return seconds[0], seconds[1]


def _plan(warm: Times, elapsed_s: float) -> tuple[int, bool]:
    """How many rounds this size gets, and whether the next has a turn: it may take as much longer as it is larger."""
    round_s = RUN * sum(warm)
    rounds = min(max(int(SIZE_S / round_s), FEW_ROUNDS), ROUNDS)
    if elapsed_s + rounds * round_s > LIMIT_S:
        return 0, False
    growth = max(after / before for before, after in pairwise(TOKENS))
    return rounds, elapsed_s + rounds * round_s + 2 * growth * sum(warm) < LIMIT_S


def _tell(group: MlxGroup, *numbers: int) -> list[int]:
    """What rank 0 says."""
    rows = group.gather(mx.array(numbers, mx.int64))
    return [int(number) for number in np.array(rows)[0]]


def _checksum(x: mx.array) -> int:
    return crc32(np.array(x.view(mx.uint8)).tobytes())

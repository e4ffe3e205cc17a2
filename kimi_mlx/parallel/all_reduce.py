"""Tune the all-reduce at the start: time both methods for the model's message sizes; rank 0 decides for all.

Ranks that use different methods for a sum deadlock. Therefore all ranks run the same collectives here, and rank 0
broadcasts each decision.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from zlib import crc32

import mlx.core as mx
import numpy as np

from kimi_mlx.parallel.all_reduce_choice import NO_LIMIT, AllReduceChoice, AllReduceTiming, gather_limit
from kimi_mlx.parallel.group import Group, MlxGroup, barrier, gather_on_host

TOKENS = (1, 8, 64, 512)
"""Numbers of tokens per message: decode of one sequence, of several, and up to a chunk of a prompt."""

SUMS_PER_ROUND = 4
"""Number of sums timed as one: with a single sum, a late rank finds all data already received and seems fast."""

MIN_ROUNDS, MAX_ROUNDS = 2, 7
"""Number of rounds per size: on a slow link, and on a fast one."""

TIME_PER_SIZE_S = 0.05
"""Time per size above which there are fewer rounds."""

TIME_LIMIT_S = 1.5
"""Total time limit: rounds and sizes that would exceed it are skipped."""

Times = tuple[float, float]
"""Seconds of a gathered sum and of all_sum."""


def tune_all_reduce(group: Group, width: int, dtype: mx.Dtype) -> AllReduceChoice | None:
    """Measure both methods and set the group's limit. Collective: call it on all ranks.

    Args:
        group: the ranks.
        width: number of values per token.
        dtype: dtype of the values.

    Returns:
        The choice on rank 0; None on other ranks, and for a group without a choice, as with the fast fence.
    """
    if not isinstance(group, MlxGroup) or group.has_fast_fence:
        return None
    barrier(group)
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
        rounds, is_next = _broadcast(group, *_plan(warm, elapsed_s))
        times = [_time_both(group, x, index, SUMS_PER_ROUND) for index in range(rounds)] or [warm]
        gather_s, all_sum_s = (statistics.median(column) for column in zip(*times, strict=True))
        medians.append((gather_s, all_sum_s))
        sizes.append((tokens, x.nbytes, len(times)))
    means: list[list[float]] = gather_on_host(group, medians).mean(axis=0).tolist()
    timings = [
        AllReduceTiming(tokens, size_bytes, gather_s, all_sum_s, rounds)
        for (tokens, size_bytes, rounds), (gather_s, all_sum_s) in zip(sizes, means, strict=True)
    ]
    all_checksums = gather_on_host(group, np.array(checksums, np.uint32))
    is_same_bits = bool((all_checksums == all_checksums[0]).all())
    limit = gather_limit(timings, len(timings) == len(TOKENS)) if is_same_bits else NO_LIMIT
    [group.gather_limit_bytes] = _broadcast(group, limit)
    seconds = time.perf_counter() - begin
    return AllReduceChoice(group.gather_limit_bytes, tuple(timings), is_same_bits, seconds) if group.rank == 0 else None


def _values(tokens: int, width: int, rank: int) -> mx.array:
    """Return values whose sum depends on the order of the additions."""
    numbers = mx.arange(tokens * width, dtype=mx.int32) % 1009 - 504
    return (numbers * (0.1234567 + 0.7654321 * rank)).reshape(tokens, width)


def _time_both(group: MlxGroup, x: mx.array, round_index: int, num_sums: int) -> Times:
    """Time a sum with each method, as in a model: on a value just computed, whose result is used immediately.

    Args:
        group: the ranks.
        x: value to sum.
        round_index: index of the round; the order of the methods alternates.
        num_sums: number of consecutive sums, each on the result of the previous one.
    """
    methods = (group.sum_gathered, group.all_sum)
    seconds = [0.0, 0.0]
    for index in (0, 1) if round_index % 2 == 0 else (1, 0):
        barrier(group)  # so that no GPU operation waits long for a late rank
        begin = time.perf_counter()
        total = x
        for _ in range(num_sums):
            total = methods[index](total + 0) * (1 / group.size)
        mx.eval(total)
        seconds[index] = (time.perf_counter() - begin) / num_sums
    return seconds[0], seconds[1]


def _plan(warm: Times, elapsed_s: float) -> tuple[int, bool]:
    """Return the number of rounds for this size, and whether to measure the next, whose time may grow with its size."""
    round_s = SUMS_PER_ROUND * sum(warm)
    rounds = min(max(int(TIME_PER_SIZE_S / round_s), MIN_ROUNDS), MAX_ROUNDS)
    if elapsed_s + rounds * round_s > TIME_LIMIT_S:
        return 0, False
    growth = max(after / before for before, after in pairwise(TOKENS))
    return rounds, elapsed_s + rounds * round_s + 2 * growth * sum(warm) < TIME_LIMIT_S


def _broadcast(group: MlxGroup, *numbers: int) -> list[int]:
    """Return the numbers of rank 0."""
    return [int(number) for number in gather_on_host(group, np.array(numbers, np.int64))[0]]


def _checksum(x: mx.array) -> int:
    mx.eval(x)  # before the view, which may be an operation on the GPU
    return crc32(np.array(x.view(mx.uint8)).tobytes())

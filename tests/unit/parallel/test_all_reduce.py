"""All-reduce tuning: the choice from timings, and the measurement with a peer that always agrees."""

from __future__ import annotations

import json
import time

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.parallel.all_reduce import MIN_ROUNDS, TIME_LIMIT_S, TOKENS, tune_all_reduce
from kimi_mlx.parallel.all_reduce_choice import NO_LIMIT, AllReduceChoice, AllReduceTiming, gather_limit
from kimi_mlx.parallel.group import MlxGroup, SingleGroup

SIZES = (1000, 8000, 64000)


def timings(*pairs: tuple[float, float]) -> list[AllReduceTiming]:
    return [AllReduceTiming(size // 1000, size, *pair, 7) for size, pair in zip(SIZES, pairs, strict=True)]


@pytest.mark.parametrize(
    ("pairs", "limit"),
    [
        ([(1, 2), (1, 2), (1, 2)], NO_LIMIT),
        ([(2, 1), (2, 1), (2, 1)], 0),
        ([(1, 2), (1, 2), (2, 1)], 22627),
        ([(1, 2), (2, 1), (2, 1)], 2828),
        ([(1, 2), (1.1, 1), (1, 2)], NO_LIMIT),  # noise
        ([(1, 1), (1, 1), (1, 1)], NO_LIMIT),
    ],
)
def test_limit_separates_sizes_by_faster_method(pairs: list[tuple[float, float]], limit: int) -> None:
    assert gather_limit(timings(*pairs), is_complete=True) == limit
    if limit == NO_LIMIT:
        assert gather_limit(timings(*pairs), is_complete=False) == SIZES[-1]


@given(st.lists(st.tuples(st.floats(1e-6, 10), st.floats(1e-6, 10)), min_size=3, max_size=3))
def test_no_other_limit_is_better(pairs: list[tuple[float, float]]) -> None:
    measured = timings(*pairs)
    limit = gather_limit(measured, is_complete=True)

    def relative(cut: int) -> float:
        return sum(
            (each.gather_s if each.size_bytes <= cut else each.all_sum_s) / min(each.gather_s, each.all_sum_s)
            for each in measured
        )

    assert relative(limit) <= min(relative(cut) for cut in (0, *SIZES)) + 1e-9


class Agreeing(MlxGroup):
    """Rank 0 of two whose peer always sends the same data.

    Args:
        gather_s: duration of a gather.
        all_sum_s: duration of an all_sum.
        is_exact: whether the peer's all_sum has the same bits.
    """

    def __init__(self, gather_s: float = 0.0, all_sum_s: float = 0.0, is_exact: bool = True):
        self.rank, self.size, self.has_fast_fence = 0, 2, False
        self._gather_s, self._all_sum_s, self._is_exact = gather_s, all_sum_s, is_exact

    def gather(self, x: mx.array) -> mx.array:
        time.sleep(self._gather_s if x.dtype == mx.float32 else 0)
        return mx.stack([x, x if self._is_exact or x.dtype != mx.uint32 else x + 1])

    def all_sum(self, x: mx.array) -> mx.array:
        time.sleep(self._all_sum_s)
        return x + x


def chosen(group: MlxGroup) -> AllReduceChoice:
    choice = tune_all_reduce(group, 16, mx.float32)
    assert choice is not None
    assert AllReduceChoice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice
    assert group.gather_limit_bytes == choice.gather_limit_bytes
    return choice


@pytest.mark.parametrize(("gather_s", "all_sum_s", "limit"), [(0, 0.004, NO_LIMIT), (0.004, 0, 0)])
def test_faster_method_is_chosen(gather_s: float, all_sum_s: float, limit: int) -> None:
    choice = chosen(Agreeing(gather_s, all_sum_s))
    assert choice.gather_limit_bytes == limit
    assert [each.tokens for each in choice.timings] == list(TOKENS)
    assert all(each.rounds >= MIN_ROUNDS for each in choice.timings)
    assert "1 tokens, 64 B: gathered " in choice.details()


def test_a_slow_link_is_not_measured_for_long() -> None:
    begin = time.perf_counter()
    choice = chosen(Agreeing(0.1, 0.2))
    assert time.perf_counter() - begin < TIME_LIMIT_S + 0.5
    assert (len(choice.timings), choice.gather_limit_bytes) == (1, 64)
    assert str(choice) == "sums up to 64 B are gathered and added, larger ones use all_sum"


def test_all_sum_is_not_used_if_its_bits_differ_between_ranks() -> None:
    choice = chosen(Agreeing(gather_s=0.001, is_exact=False))
    assert (choice.gather_limit_bytes, choice.is_same_bits) == (NO_LIMIT, False)
    assert "different bits" in str(choice)


def test_single_rank_makes_no_choice() -> None:
    assert tune_all_reduce(SingleGroup(), 16, mx.float32) is None

"""Queries of a step divided over ranks: even times, and the results of one rank."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model.attention_cost import AttentionCost, AttentionShape
from kimi_mlx.model.cache import SharedRows
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.device_traits import CPU_TUNING, METAL_TUNING, Tuning
from kimi_mlx.model.query_split import QueryCost, QuerySplit
from kimi_mlx.parallel.placement import place
from kimi_mlx.parallel.sum_communicator import SumCommunicator
from kimi_mlx.parallel.tune_split import tune_query_split
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.layer_plan import split_granularity_of
from kimi_mlx.weights.reader import open_checkpoint
from tests.divisible import write_divisible

COST = QueryCost(read_s=1e-4, row_s=2e-5, absorb_s=1e-5, latent_pair_s=2e-9, head_pair_s=1e-9)


class ThreadGroup:
    """One of several ranks, each in a thread of this process. Its collectives compute their input at once."""

    def __init__(self, rank: int, parts: list[np.ndarray], barrier: threading.Barrier):
        self.rank, self.size = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    def gather(self, x: mx.array) -> mx.array:
        self._parts[self.rank] = np.array(x)
        self._barrier.wait(30)
        rows = mx.array(np.stack(self._parts))
        self._barrier.wait(30)
        return rows

    def sum(self, x: mx.array) -> mx.array:
        return self.gather(x).sum(axis=0)


def on_ranks(size: int, work: Callable[[ThreadGroup], np.ndarray]) -> list[np.ndarray]:
    """Return the result of each rank."""
    parts, barrier = [np.zeros(0)] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, ThreadGroup(rank, parts, barrier)) for rank in range(size)]
        return [future.result() for future in futures]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_divisible(tmp_path_factory.mktemp("split"), "k2", layers=2)


def load_rank(folder: Path, strategy: str, group: ThreadGroup) -> Model:
    config = load_config(folder)
    units = split_granularity_of(open_checkpoint(folder, config).checkpoint, strategy)
    placement = place(config, strategy, group.size, units)
    return load_model(folder, config, mx.float32, placement.shares[group.rank], SumCommunicator(group, placement))


def random_lengths(random: random.Random) -> list[tuple[int, int]]:
    return [
        (random.choice([0, 7, 900, 20_000]), random.choice([0, 1, 3, 64, 300])) for _ in range(random.randint(1, 5))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_ranges_have_even_times(seed: int) -> None:
    rng = random.Random(seed)
    split = QuerySplit(rng.randint(2, 5), COST, 4096, ((1.0, 0.0),))
    lengths = random_lengths(rng)
    count = sum(length for _, length in lengths)
    bounds = split.bounds(lengths)
    if bounds is None:
        assert count < 20
        return
    assert (bounds[0], bounds[-1], len(bounds)) == (0, count, split.num_ranks + 1)
    assert all(start < stop for start, stop in pairwise(bounds))
    rows = np.concatenate([COST.rows(*pair) for pair in lengths])
    times = [rows[start:stop].sum() for start, stop in pairwise(bounds)]
    assert max(times) <= rows.sum() / split.num_ranks + rows.max() * 1.001


def test_later_queries_of_a_prompt_make_a_shorter_range() -> None:
    bounds = QuerySplit(2, COST, 4096, ((1.0, 0.0),)).bounds([(0, 100_000)])
    assert bounds is not None
    assert 50_000 < bounds[1] < 75_000


def test_a_slow_link_divides_only_what_takes_longer() -> None:
    split = QuerySplit(2, COST, 4096, ((4096.0, 1e-3), (4096.0 * 512, 3e-3)))
    assert split.gather_s(4096 * 1024) == pytest.approx(6e-3)
    assert split.bounds([(0, 1)]) is None
    assert split.bounds([(0, 32)]) is None
    assert split.bounds([(0, 512)]) is not None


def test_few_queries_take_the_time_to_read_the_weights() -> None:
    cost = QueryCost(read_s=1.0, row_s=0.1, absorb_s=0, latent_pair_s=0, head_pair_s=0)
    split = QuerySplit(2, cost, 1, ((1.0, 0.0),))
    assert split.bounds([(9, 1)] * 10) is None
    assert split.bounds([(9, 1)] * 11) is not None


@pytest.mark.parametrize("strategy", ["hybrid", "hybrid:3:1", "expert", "hybrid:1:2:1"])
@pytest.mark.parametrize(
    "tuning", [CPU_TUNING, pytest.param(METAL_TUNING, marks=pytest.mark.slow)], ids=["cpu", "metal"]
)
def test_logits_and_caches_are_those_of_one_rank(strategy: str, tuning: Tuning, folder: Path) -> None:
    rng = random.Random(strategy)
    size = 3 if strategy.count(":") == 3 else 2
    steps = [
        [([rng.randrange(200) for _ in range(length)], num_logits) for length, num_logits in step]
        for step in ([(23, 0), (2, 2), (40, 1)], [(9, 9), (1, 1), (5, 0)], [(1, 1), (1, 1), (1, 1)])
    ]

    shared_tokens = [rng.randrange(200) for _ in range(17)]

    def run(model: Model) -> np.ndarray:
        model.tune(tuning)
        caches = [model.make_cache() for _ in steps[0]]
        prefix = model.make_cache()
        mx.eval(model.hidden(mx.array([shared_tokens]), [SequenceSlice(prefix, len(shared_tokens), 0)]))
        for cache in caches[:2]:
            for layer, source in zip(cache, prefix, strict=True):
                layer.copy(source, len(shared_tokens), SharedRows(source.fetch(len(shared_tokens))))
        outputs: list[np.ndarray] = []
        for step in steps:
            tokens = mx.array([[token for tokens, _ in step for token in tokens]])
            slices = [SequenceSlice(cache, len(tokens), n) for cache, (tokens, n) in zip(caches, step, strict=True)]
            outputs.append(np.array(model.logits(model.hidden(tokens, slices))).ravel())
        return np.concatenate(outputs)

    gathers: list[int] = []

    def run_rank(group: ThreadGroup) -> np.ndarray:
        model = load_rank(folder, strategy, group)
        assert isinstance(model.communicator, SumCommunicator)
        model.communicator.query_split = QuerySplit(size, COST, 4, ((1.0, -1.0),))
        gather_queries = model.communicator.gather_queries

        def count_gather(attended: mx.array, bounds: Sequence[int]) -> mx.array:
            gathers.append(attended.shape[1])
            return gather_queries(attended, bounds)

        model.communicator.gather_queries = count_gather
        return run(model)

    single = run(load_model(folder, load_config(folder), mx.float32))
    results = on_ranks(size, run_rank)
    assert len(gathers) == size * (2 * len(steps) + 1)  # the prefix needs one query in its last layer
    assert all(np.array_equal(result, results[0]) for result in results)
    np.testing.assert_allclose(results[0], single, rtol=0, atol=2e-5 * np.abs(single).max())


def test_heads_of_other_ranks_prevent_the_division(folder: Path) -> None:
    def tune(group: ThreadGroup) -> np.ndarray:
        splits: list[bool] = []
        for strategy in ("tensor", "hybrid"):
            model = load_rank(folder, strategy, group)
            assert isinstance(model.communicator, SumCommunicator)
            tune_query_split(group, model, None)
            splits.append(model.communicator.query_split is not None)
        return np.array(splits)

    assert [result.tolist() for result in on_ranks(2, tune)] == [[False, True]] * 2


def test_cost_of_k2_prefers_the_latent_space_for_few_queries_on_a_long_context() -> None:
    shape = AttentionShape(64, 128, 64, 128, 512)
    cost = AttentionCost(shape, METAL_TUNING)
    query_cost = QueryCost(0, 0, cost.expand_s, cost.latent_pair_s, cost.head_pair_s)
    for offset, length in [(0, 64), (8192, 16), (8192, 128), (8192, 512)]:
        pair_s = cost.latent_pair_s if cost.is_latent(offset, length) else cost.head_pair_s
        assert np.diff(query_cost.rows(offset, length)) == pytest.approx(pair_s)

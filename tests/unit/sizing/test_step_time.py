"""The estimated time of chunks, and the chunks that fit while others decode. No model is loaded."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import pairwise

import pytest

from kimi_mlx.model.device_traits import TUNINGS, DeviceKind
from kimi_mlx.sizing.prefill import RankShape
from kimi_mlx.sizing.step_time import (
    CHUNK_STEP,
    SHARED_STEP_S,
    ChunkBudget,
    ChunkEstimate,
    HeldExperts,
    chunk_cost,
)
from tests.unit.sizing.test_prefill import K2

HALF_OF_K2 = RankShape(heads=32, expert_rows=1024, value_bytes=2, is_fused=True)
HALF_OF_EXPERTS = HeldExperts(per_token=8, num_bytes=270 * 10**9)
OFFSETS = (0, 500, 2_000, 8_000, 32_000, 128_000)


def k2_estimate(kind: DeviceKind = "metal") -> ChunkEstimate:
    config = replace(K2, n_routed_experts=384)
    return ChunkEstimate(chunk_cost(config, HALF_OF_K2, 61, HALF_OF_EXPERTS, TUNINGS[kind]), config)


@pytest.mark.parametrize("kind", ["metal", "cpu"])
def test_more_tokens_and_longer_contexts_take_longer(kind: DeviceKind) -> None:
    estimate = k2_estimate(kind)
    for offset in OFFSETS:
        # Where attention by heads begins, the cached tokens are expanded: one query more costs more than its share.
        times = [estimate.seconds(offset, length) for length in range(CHUNK_STEP, 257, CHUNK_STEP)]
        assert all(later > earlier * 0.5 for earlier, later in pairwise(times))
    for length in (1, 8, 64, 256):
        times = [estimate.seconds(offset, length) for offset in OFFSETS]
        assert times == sorted(times)


def test_chunks_of_k2_on_two_macs() -> None:
    estimate = k2_estimate()
    chunks = [ChunkBudget(512, estimate).largest(offset) for offset in OFFSETS]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] >= 16
    assert 1 <= chunks[-1] <= CHUNK_STEP
    for offset, chunk in zip(OFFSETS, chunks, strict=True):
        assert chunk == 1 or estimate.seconds(offset, chunk) <= SHARED_STEP_S


def test_without_other_sequences_a_chunk_has_its_full_size() -> None:
    budget = ChunkBudget(512, None)
    assert budget.largest(100_000) == 512
    budget.take(100_000, 300)
    assert budget.largest(0) == 212
    budget.take(0, 212)
    assert budget.largest(0) == 0


def test_several_prompts_share_the_time_of_a_step() -> None:
    estimate = k2_estimate()
    budget, total_s = ChunkBudget(512, estimate), 0.0
    for length in (16, 8, 500):
        taken = min(length, budget.largest(1_000))
        budget.take(1_000, taken)
        total_s += estimate.seconds(1_000, taken)
    assert total_s <= SHARED_STEP_S
    late = ChunkBudget(512, estimate)
    late.take(128_000, 64)  # takes all of the time
    assert late.largest(0) == 0


@pytest.mark.parametrize("chunk", [1, 2, 7, 15, 16, 40])
def test_small_chunks_are_kept(chunk: int) -> None:
    largest = ChunkBudget(chunk, k2_estimate()).largest(0)
    assert 1 <= largest <= max(chunk // 2, 1)


def test_ranks_with_less_of_the_model_take_less_time() -> None:
    config = replace(K2, n_routed_experts=384)
    quarter = replace(HALF_OF_K2, heads=16, expert_rows=512)
    experts = HeldExperts(8, HALF_OF_EXPERTS.num_bytes // 2)
    less = astuple(chunk_cost(config, quarter, 61, experts, TUNINGS["metal"]))
    more = astuple(chunk_cost(config, HALF_OF_K2, 61, HALF_OF_EXPERTS, TUNINGS["metal"]))
    assert all(small < large for small, large in zip(less, more, strict=True))


def test_ranks_that_divide_queries_take_larger_chunks() -> None:
    config = replace(K2, n_routed_experts=384)
    tuning = TUNINGS["metal"]
    whole = chunk_cost(config, HALF_OF_K2, 61, HALF_OF_EXPERTS, tuning)
    half = chunk_cost(config, HALF_OF_K2, 61, HALF_OF_EXPERTS, tuning, 2)
    assert (half.head_pair_s, half.latent_pair_s) == (whole.head_pair_s / 2, whole.latent_pair_s / 2)
    assert half.token_s < whole.token_s
    assert half.expand_s == whole.expand_s  # every rank repeats it
    slow = chunk_cost(config, HALF_OF_K2, 61, HALF_OF_EXPERTS, tuning, 2, gather_s=1e-3)
    assert slow.token_s == pytest.approx(half.token_s + 61e-3)
    chunks = [ChunkEstimate(cost, config).largest_chunk(32_000, SHARED_STEP_S, 512) for cost in (slow, whole, half)]
    assert chunks == sorted(chunks)

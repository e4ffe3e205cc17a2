"""Properties of predicted speeds that hold for any constants."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.planner.constants import FAST_FENCE_S, FENCE_S, FITTED, KIMI_MLX, MLX_LM, Strategy
from kimi_mlx.planner.expert_load import expected_slowest
from kimi_mlx.planner.links import RDMA, TCP, WIFI, LinkProfile, measured_link
from kimi_mlx.planner.machines import Machine, parse_machines
from kimi_mlx.planner.model_shape import known_shape
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.planner.search import STRATEGIES
from kimi_mlx.planner.speed import Setup, collectives_per_token, decode, prefill
from kimi_mlx.sizing.prefill import PREFILL_CHUNK

K2 = known_shape("kimi-k2")
TWO = parse_machines("m3-ultra-512x2")


def setup(strategy: Strategy = "hybrid", machines: tuple[Machine, ...] = TWO, link: LinkProfile | None = RDMA) -> Setup:
    portions = make_portions(strategy, K2, len(machines))
    return Setup(K2, strategy, machines, portions, link, KIMI_MLX, FENCE_S, FITTED)


def faster(machine: Machine, factor: float) -> Machine:
    chip = machine.chip
    return replace(machine, chip=replace(chip, bandwidth_gb_per_s=chip.bandwidth_gb_per_s * factor))


@given(st.sampled_from(STRATEGIES), st.floats(1, 3), st.integers(0, 1))
def test_more_bandwidth_never_slows_it_down(strategy: Strategy, factor: float, rank: int) -> None:
    mine, better = setup(strategy), list(TWO)
    better[rank] = faster(better[rank], factor)
    theirs = replace(mine, machines=better)
    assert decode(theirs, 4096).total_s <= decode(mine, 4096).total_s * (1 + 1e-9)
    assert prefill(theirs, 1024).total_s <= prefill(mine, 1024).total_s * (1 + 1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_slower_links_and_fences_take_longer(strategy: Strategy) -> None:
    times = [decode(setup(strategy, link=link), 4096).total_s for link in (RDMA, TCP, WIFI)]
    assert times == sorted(times)
    assert decode(replace(setup(strategy), fence_s=FAST_FENCE_S), 4096).total_s < times[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_longer_contexts_take_longer(strategy: Strategy) -> None:
    mine = setup(strategy)
    times = [decode(mine, context).total_s for context in (1, 1024, 8192, 131072)]
    assert times == sorted(times)
    if strategy == "pipeline":  # longer prompts keep all stages busy for longer
        mine = replace(mine, engine=MLX_LM)
    rates = [size / prefill(mine, size).total_s for size in (2048, 8192, 32768)]
    assert rates == sorted(rates, reverse=True)


def test_the_parts_of_the_time_on_one_mac() -> None:
    (machine,) = parse_machines("m3-ultra-512")
    single = replace(setup("single", (machine,), None), link=None)
    parts = decode(single, 1024)
    assert parts.fences_s == parts.link_s == 0
    read = parts.read_s * 819e9 * FITTED.bandwidth_share
    assert read == pytest.approx(18.1e9, rel=0.02)  # 32 B active values at 4.5 bits


def test_collectives() -> None:
    counts = [
        collectives_per_token(strategy, 61, 4) for strategy in ("single", "pipeline", "tensor", "hybrid", "expert")
    ]
    assert counts == [0, 4, 122, 61, 61]


def test_a_pipeline_sends_states_to_the_next_stage_and_back() -> None:
    parts = decode(setup("pipeline", link=WIFI), 4096)
    assert parts.fences_s == 2 * FENCE_S
    assert parts.link_s == pytest.approx(2 * WIFI.send_s(2 * K2.config.hidden_size))


def test_stages_overlap_chunks_of_a_prompt() -> None:
    mine = setup("pipeline")
    waiting = replace(mine, engine=replace(KIMI_MLX, overlaps_chunks=False))
    chunks = 8
    ratio = prefill(mine, chunks * PREFILL_CHUNK).total_s / prefill(waiting, chunks * PREFILL_CHUNK).total_s
    assert ratio == pytest.approx((chunks + 1) / (2 * chunks), rel=0.05)


def test_small_all_reduces_on_a_ring_are_gathered() -> None:
    assert TCP.all_reduce_s(14336, 4, gathers=True) < TCP.all_reduce_s(14336, 4, gathers=False)
    assert TCP.all_reduce_s(1e8, 4, gathers=True) == TCP.all_reduce_s(1e8, 4, gathers=False)
    assert measured_link(TCP.hop_s * 2, TCP.bytes_per_s).all_reduce_s(14336, 2, True) == TCP.all_reduce_s(
        14336, 2, True
    )


@pytest.mark.parametrize(("experts", "chosen"), [([3, 3], 2), ([5, 2, 1], 3), ([4, 4, 4], 4)])
def test_the_expected_slowest_rank_equals_an_enumeration(experts: list[int], chosen: int) -> None:
    owners = [rank for rank, held in enumerate(experts) for _ in range(held)]
    fixed, each = [0.5 * rank for rank in range(len(experts))], [1.0 + rank for rank in range(len(experts))]
    times = [
        max(fixed[rank] + each[rank] * picked.count(rank) for rank in range(len(experts)))
        for picked in itertools.combinations(owners, chosen)
    ]
    assert expected_slowest(experts, chosen, fixed, each) == pytest.approx(sum(times) / len(times))


def test_whole_experts_wait_for_the_busiest_rank() -> None:
    assert decode(setup("expert"), 4096).read_s > decode(setup("hybrid"), 4096).read_s


def test_the_planner_uses_the_engines_chunk() -> None:
    assert KIMI_MLX.prefill_chunk == PREFILL_CHUNK


def test_queries_of_a_prompt_are_divided_where_it_pays() -> None:
    whole = replace(KIMI_MLX, divides_queries=False)
    for strategy in STRATEGIES:
        mine = setup(strategy)
        theirs = replace(mine, engine=whole)
        gain = prefill(theirs, 2048, 8192).total_s / prefill(mine, 2048, 8192).total_s
        assert gain > 1.05 if strategy in ("hybrid", "expert") else gain == 1
        assert decode(mine, 8192) == decode(theirs, 8192)
    slow = setup("hybrid", link=WIFI)
    assert prefill(slow, 2048) == prefill(replace(slow, engine=whole), 2048)

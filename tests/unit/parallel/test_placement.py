"""Placements: in every strategy the shares cover every row once, in whole units, in proportion to the weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import PlacementError, UsageError
from kimi_mlx.model.config import ModelConfig, parse_config
from kimi_mlx.parallel.placement import (
    SHARDED_AXES,
    STRATEGIES,
    Placement,
    Range,
    RankShare,
    SplitGranularity,
    normalize_strategy,
    parse_strategy,
    place,
    split_proportionally,
)
from kimi_mlx.planner.model_shape import known_shape
from tests.checkpoints import load_golden

K2 = known_shape("kimi-k2").config
UNITS = SplitGranularity(heads=1, expert=64, shared=64, dense=64)
WEIGHTS = st.lists(st.integers(1, 600), min_size=1, max_size=8)


@given(total=st.integers(1, 5000), unit=st.integers(1, 128), weights=WEIGHTS)
def test_ranges_cover_all_rows_once_in_whole_units(total: int, unit: int, weights: Sequence[int]) -> None:
    pieces = -(-total // unit)
    if pieces < len(weights):
        with pytest.raises(PlacementError, match=f"{pieces} pieces, but there are {len(weights)} ranks"):
            split_proportionally(total, unit, weights, "rows")
        return
    spans = split_proportionally(total, unit, weights, "rows")
    assert spans[0].start == 0
    assert spans[-1].stop == total
    assert all(before.stop == after.start for before, after in itertools.pairwise(spans))
    assert all(span.start % unit == 0 for span in spans)
    sizes = [-(-len(span) // unit) for span in spans]
    assert min(sizes) >= 1
    wanted = [pieces * weight / sum(weights) for weight in weights]
    if min(wanted) >= 1:
        assert all(abs(size - exact) <= 1 + 1e-9 for size, exact in zip(sizes, wanted, strict=True))


def test_without_a_unit_ranges_are_empty() -> None:
    assert [len(span) for span in split_proportionally(100, None, (1, 2), "rows")] == [0, 0]


def weights_of(size: int) -> str:
    return ":".join(str(3 + rank * 5 % 4) for rank in range(size))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("is_even", [True, False])
def test_strategy_shards_its_axes_of_k2(strategy: str, size: int, is_even: bool) -> None:
    placement = place(K2, strategy if is_even else f"{strategy}:{weights_of(size)}", size, UNITS)
    assert placement.world_size == size
    name, weights = parse_strategy(placement.strategy)
    assert name == (strategy if size > 1 else "hybrid")
    totals = {
        "layers": K2.num_hidden_layers,
        "heads": K2.num_attention_heads,
        "experts": K2.n_routed_experts,
        "expert_rows": K2.moe_intermediate_size,
        "shared_rows": K2.moe_intermediate_size * K2.n_shared_experts,
        "dense_rows": K2.intermediate_size,
        "vocab_rows": K2.vocab_size,
    }
    for field, total in totals.items():
        spans = [share.range_of(field) for share in placement.shares]
        if field in SHARDED_AXES[name] and size > 1:
            assert placement.is_sharded(field)
            assert (spans[0].start, spans[-1].stop) == (0, total)
            assert all(before.stop == after.start for before, after in itertools.pairwise(spans))
            unit = {"expert_rows": 64, "shared_rows": 64, "dense_rows": 64}.get(field, 1)
            for span, weight in zip(spans, weights or [1] * size, strict=True):
                assert abs(len(span) - total * weight / (sum(weights) or size)) <= unit
        elif (field, name) != ("vocab_rows", "pipeline"):
            assert not placement.is_sharded(field)
            assert spans[0] == Range(0, total)
    heads = [len(share.vocab_rows) for share in placement.shares]
    tables = [len(share.embed_rows) for share in placement.shares]
    if name == "pipeline":
        assert heads == tables == [K2.vocab_size] + [0] * (size - 1)
    else:
        assert sum(heads) == K2.vocab_size
        assert tables == [K2.vocab_size] * size


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_placement_survives_json(strategy: str) -> None:
    placement = place(K2, f"{strategy}:2:1", 2, UNITS)
    assert Placement.from_dict(placement.to_dict()) == placement
    assert Placement.from_dict(placement.to_dict()).digest == placement.digest
    assert place(K2, f"{strategy}:1:2", 2, UNITS).digest != placement.digest


@pytest.mark.parametrize(
    ("text", "size", "normal"),
    [
        ("tensor", 2, "tensor"),
        ("tensor:5:5", 2, "tensor"),
        ("tensor:512:128", 2, "tensor:4:1"),
        ("pipeline", 1, "hybrid"),
        ("expert:7", 1, "hybrid"),
    ],
)
def test_strategies_are_normalized(text: str, size: int, normal: str) -> None:
    assert normalize_strategy(text, size) == normal


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rings", "unknown strategy `rings`"),
        ("", "unknown strategy ``"),
        ("hybrid:1:0", "invalid weights"),
        ("hybrid:1:x", "invalid weights"),
        ("hybrid:1:", "invalid weights"),
        ("hybrid:1:1048577", "invalid weights"),
        pytest.param("hybrid:1:" + "5" * 5000, "invalid weights", id="many digits"),
        ("hybrid:1:2:3", "has 3 weights, but there are 2 ranks"),
    ],
)
def test_invalid_strategies_are_rejected(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        normalize_strategy(text, 2)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("strategy", "words"),
    [("hybrid", "expert rows in units of 32"), ("expert", "experts"), ("tensor", "heads"), ("pipeline", "layers")],
)
def test_too_many_ranks_are_refused(strategy: str, words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        place(small_config(), strategy, 64, SplitGranularity(heads=2, expert=32, shared=32, dense=32))


def small_config() -> ModelConfig:
    return parse_config(load_golden("k2").config)


def test_sharded_axes_are_fields_of_rank_share() -> None:
    names = {field.name for field in fields(RankShare)}
    assert set().union(*SHARDED_AXES.values()) <= names

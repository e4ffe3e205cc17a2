"""Collectives of sharded ranks: one or two sums per layer, one gather for the head, and correct results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Event, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import RingError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.parallel.placement import Placement, Range, RankShare, place
from kimi_mlx.parallel.sum_communicator import SumCommunicator
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.layer_plan import split_granularity_of
from kimi_mlx.weights.reader import open_checkpoint
from tests.divisible import write_divisible


class CountingGroup:
    """One rank of `size` that receives its own data back, and counts collectives."""

    def __init__(self, size: int, rank: int = 0):
        self.size, self.rank = size, rank
        self.sums = self.gathers = 0

    def sum(self, x: mx.array) -> mx.array:
        self.sums += 1
        return x

    def gather(self, x: mx.array) -> mx.array:
        self.gathers += 1
        return mx.stack([x] * self.size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_divisible(tmp_path_factory.mktemp("sums"), "k2", layers=3)


def load_rank(folder: Path, strategy: str, group: CountingGroup) -> Model:
    """Load one rank's share with a group that replaces the other ranks."""
    config = load_config(folder)
    units = split_granularity_of(open_checkpoint(folder, config).checkpoint, strategy)
    placement = place(config, strategy, group.size, units)
    return load_model(folder, config, mx.float32, placement.shares[group.rank], SumCommunicator(group, placement))


@pytest.mark.parametrize(("strategy", "sums"), [("hybrid", 1), ("tensor", 2), ("expert", 1)])
@pytest.mark.parametrize("rank", [0, 1])
def test_step_has_the_expected_sums_per_layer_and_one_gather(strategy: str, sums: int, rank: int, folder: Path) -> None:
    group = CountingGroup(2, rank)
    model = load_rank(folder, f"{strategy}:2:1", group)
    for tokens in ([[1, 2, 3]], [[4]]):
        group.sums = group.gathers = 0
        assert model(mx.array(tokens)).shape == (1, len(tokens[0]), model.config.vocab_size)
        assert (group.sums, group.gathers) == (sums * model.config.num_hidden_layers, 1)
    group.sums = group.gathers = 0
    engine = Engine(model)
    assert (group.sums, group.gathers) == (0, 2)  # the smallest limits, and the cost of a chunk on the slowest rank
    # The header is sent with the gather of the logits, so it costs no collective of its own. One is the barrier at the
    # beginning of a request.
    group.sums = group.gathers = 0
    list(engine.generate(Request((1, 2, 3), max_tokens=9)))
    steps = 9
    assert group.gathers == 1 + steps
    assert group.sums == sums * steps * model.config.num_hidden_layers


def test_logits_of_unequal_width_are_concatenated_in_order() -> None:
    rows = Range(0, 1)
    shares = (RankShare(*[rows] * 7, vocab_rows=span) for span in (Range(0, 3), Range(3, 5)))
    placement = Placement("hybrid", tuple(shares))

    class TwoRanks(CountingGroup):
        def gather(self, x: mx.array) -> mx.array:
            return mx.stack([x, x + 100])

    joined = SumCommunicator(TwoRanks(2), placement).gather_logits(mx.array([[1.0, 2.0, 3.0]]))
    assert joined.tolist() == [[1, 2, 3, 101, 102]]
    joined = SumCommunicator(TwoRanks(2, 1), placement).gather_logits(mx.array([[1.0, 2.0]]))
    assert joined.shape == (1, 5)


class StaleGroup(CountingGroup):
    """A group whose gathers return stale data from some call on, as MLX's ring does when a peer is lost."""

    stale_from = 10**9
    last: mx.array | None = None

    def gather(self, x: mx.array) -> mx.array:
        rows = super().gather(x)
        if self.last is not None and self.gathers >= self.stale_from:
            return self.last if self.last.shape == rows.shape else mx.full(rows.shape, 7.0)
        self.last = rows
        return rows


def _noted(events: Iterator[Event], seen: list[Event]) -> Iterator[Event]:
    for event in events:
        seen.append(event)
        yield from ()


def test_stale_gather_raises_ring_error_and_yields_no_token(folder: Path) -> None:
    group = StaleGroup(2)
    engine = Engine(load_rank(folder, "hybrid", group), prefill_chunk=2)
    expected = [event.id for event in engine.generate(Request((1, 2, 3), max_tokens=9)) if isinstance(event, Token)]
    # The first gather is a barrier, the second is of a chunk of the prompt.
    for stale_from, tokens in ((3, 0), (4, 1), (7, 4)):
        engine.clear()
        group.gathers, group.stale_from = 0, stale_from
        seen: list[Event] = []
        with pytest.raises(RingError, match="data of another step"):
            seen.extend(_noted(engine.generate(Request((1, 2, 3), max_tokens=9)), seen))
        assert [event.id for event in seen if isinstance(event, Token)] == expected[:tokens]
        group.stale_from = 10**9


def test_single_group_returns_its_input() -> None:
    group = SingleGroup()
    assert group.sum(mx.array([2.0])).tolist() == [2]
    assert group.gather(mx.array([2.0])).shape == (1, 1)

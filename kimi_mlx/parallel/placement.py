"""Placements: the part of the model that each rank holds, from the dimensions, a strategy and the ranks' weights.

Strategies, what they shard, and the communication per token:

    hybrid     rows of every expert and MLP, rows of the head; attention on every rank    one sum per layer
    tensor     as hybrid, and the attention heads                                         two sums per layer
    expert     whole experts, rows of shared experts and dense MLPs, rows of the head     one sum per layer
    pipeline   layers; rank 0 has the embedding and the head, too                         one message per rank

The embedding is never sharded: that would cost a collective per token and save 0.1 % of the weights. A vision tower is
held by rank 0 alone: the others get its features.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from kimi_mlx.errors import PlacementError, UsageError
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.units import is_short_number

StrategyName = Literal["hybrid", "tensor", "expert", "pipeline"]

STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)

MAX_WEIGHT = 1 << 20
"""Maximum weight of a rank in a strategy: enough for sizes in gigabytes or megabytes."""


@dataclass(frozen=True)
class Range:
    """Indices from start (included) to stop (excluded)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class RankShare:
    """A rank's share of the weights, as index ranges of the unquantized, unsharded model.

    Args:
        layers: range of num_hidden_layers.
        heads: range of num_attention_heads.
        experts: range of n_routed_experts, whole experts.
        expert_rows: range of moe_intermediate_size, in each of these and in the shared experts fused with them.
        shared_rows: range of the rows of shared experts that are not fused with the routed ones.
        dense_rows: range of intermediate_size.
        embed_rows: range of vocab_size in the embedding.
        vocab_rows: range of vocab_size in the head; the last norm belongs to it.
        has_vision: whether the rank holds the vision tower, if the model has one. It is not part of a placement's
            digest: stores with and without the tower have the same placement.
    """

    layers: Range
    heads: Range
    experts: Range
    expert_rows: Range
    shared_rows: Range
    dense_rows: Range
    embed_rows: Range
    vocab_rows: Range
    has_vision: bool = False

    def range_of(self, name: str) -> Range:
        """Return the range of the axis `name`."""
        return getattr(self, name)


RANGE_FIELDS = tuple(item.name for item in fields(RankShare) if item.name != "has_vision")
"""Fields of a RankShare that are ranges."""


@dataclass(frozen=True)
class Placement:
    """The shares of all ranks.

    Args:
        strategy: name of the strategy, with the weights of the ranks if they differ: `hybrid`, `tensor:3:1`.
        shares: share of each rank.
    """

    strategy: str
    shares: tuple[RankShare, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.shares)

    def is_sharded(self, name: str) -> bool:
        """Return whether ranks hold different ranges of the axis `name`."""
        return len({share.range_of(name) for share in self.shares}) > 1

    def to_dict(self) -> dict[str, Any]:
        """Return the placement as JSON; ranges become pairs."""
        ranges = ({name: share.range_of(name) for name in RANGE_FIELDS} for share in self.shares)
        shares = [{name: [span.start, span.stop] for name, span in by_name.items()} for by_name in ranges]
        return {"strategy": self.strategy, "shares": shares}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Placement:
        """Read the output of to_dict; raise KeyError, TypeError or ValueError for anything else."""
        shares = (
            RankShare(**{name: Range(*map(int, span)) for name, span in share.items()}, has_vision=rank == 0)
            for rank, share in enumerate(value["shares"])
        )
        return cls(str(value["strategy"]), tuple(shares))

    @property
    def digest(self) -> str:
        """Short hash that distinguishes placements of equal strategy and size."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:6]


@dataclass(frozen=True)
class SplitGranularity:
    """Smallest splittable unit of each axis: a whole quantization group, or 1. None without such matrices.

    Args:
        heads: number of attention heads, from the columns of the output projections.
        expert: number of expert rows, from the columns of the experts' down projections.
        shared: the same for the shared experts.
        dense: the same for the dense layers.
    """

    heads: int | None = 1
    expert: int | None = 1
    shared: int | None = 1
    dense: int | None = 1


def parse_strategy(text: str) -> tuple[StrategyName, tuple[int, ...]]:
    """Return the name of a strategy and the weights of its ranks, if given.

    Args:
        text: strategy, such as `hybrid`, or `hybrid:512:128` for two ranks of unequal memory.

    Raises:
        UsageError: unknown strategy, or weights that are not positive integers.
    """
    name, *parts = text.split(":")
    if name not in STRATEGIES:
        raise UsageError(f"unknown strategy `{name}`", hint=f"use one of {', '.join(STRATEGIES)}")
    if not all(is_short_number(part) and 0 < int(part) <= MAX_WEIGHT for part in parts):
        raise UsageError(
            f"`{text}` has invalid weights",
            hint=f"use whole numbers from 1 to {MAX_WEIGHT}, one per rank: `--strategy {name}:3:1`",
        )
    return name, tuple(map(int, parts))


def normalize_strategy(text: str, world_size: int) -> str:
    """Return a strategy in canonical form: no equal weights, no common factors; `hybrid` for one rank.

    Raises:
        UsageError: as in parse_strategy, or the number of weights is not the number of ranks.
    """
    name, weights = parse_strategy(text)
    if weights and len(weights) != world_size:
        raise UsageError(
            f"`{text}` has {len(weights)} weights, but there are {world_size} ranks",
            hint=f"give one weight per rank, or none: `--strategy {name}`",
        )
    if world_size == 1:
        return "hybrid"
    if len(set(weights)) == 1:
        return name
    factor = math.gcd(*weights)
    return ":".join([name, *(str(weight // factor) for weight in weights)])


def place(config: ModelConfig, strategy: str, world_size: int, granularity: SplitGranularity) -> Placement:
    """Return the placement that splits in proportion to the weights, as far as the granularity allows.

    Args:
        config: the model's dimensions.
        strategy: strategy as in parse_strategy.
        world_size: number of ranks.
        granularity: smallest splittable units of the checkpoint.

    Raises:
        PlacementError: a rank would hold nothing of a matrix.
        UsageError: as normalize_strategy.
    """
    strategy = normalize_strategy(strategy, world_size)
    name, weights = parse_strategy(strategy)
    is_sharded = {field: field in SHARDED_AXES[name] for field in RANGE_FIELDS}

    def ranges(field: str, total: int, unit: int | None, axis: str) -> list[Range]:
        if not is_sharded[field]:
            return [Range(0, total)] * world_size
        return split_proportionally(total, unit, weights or (1,) * world_size, axis)

    width = config.moe_intermediate_size
    columns = {
        "layers": ranges("layers", config.num_hidden_layers, 1, "layers"),
        "heads": ranges("heads", config.num_attention_heads, granularity.heads, "heads"),
        "experts": ranges("experts", config.n_routed_experts, 1, "experts"),
        "expert_rows": ranges("expert_rows", width, granularity.expert, "expert rows"),
        "shared_rows": ranges(
            "shared_rows", width * max(config.n_shared_experts, 1), granularity.shared, "shared expert rows"
        ),
        "dense_rows": ranges("dense_rows", config.intermediate_size, granularity.dense, "dense rows"),
        "embed_rows": [Range(0, config.vocab_size)] * world_size,
        "vocab_rows": ranges("vocab_rows", config.vocab_size, 1, "rows of the vocabulary"),
    }
    if name == "pipeline":
        elsewhere = [Range(0, 0)] * (world_size - 1)
        columns["embed_rows"][1:] = columns["vocab_rows"][1:] = elsewhere
    shares = tuple(
        RankShare(**{field: column[rank] for field, column in columns.items()}, has_vision=rank == 0)
        for rank in range(world_size)
    )
    return Placement(strategy, shares)


SHARDED_AXES: Mapping[StrategyName, frozenset[str]] = {
    "hybrid": frozenset({"expert_rows", "shared_rows", "dense_rows", "vocab_rows"}),
    "tensor": frozenset({"heads", "expert_rows", "shared_rows", "dense_rows", "vocab_rows"}),
    "expert": frozenset({"experts", "shared_rows", "dense_rows", "vocab_rows"}),
    "pipeline": frozenset({"layers"}),
}
"""Axes that a strategy shards. Of all other axes each rank holds everything."""


def split_proportionally(total: int, unit: int | None, weights: Sequence[float], axis: str) -> list[Range]:
    """Split `total` into consecutive ranges of whole units, in proportion to the weights, at least one unit each.

    Sizes are rounded down and the rest goes to the largest ranks, so that a small rank never gets more than fits.
    Without a unit the ranges are empty.

    Args:
        total: size of the axis.
        unit: smallest splittable unit; the last range may end with a partial one.
        weights: weight of each rank, above 0.
        axis: description of the axis, for messages.

    Raises:
        PlacementError: fewer units than ranks.
    """
    if unit is None:
        return [Range(0, 0)] * len(weights)
    pieces = math.ceil(total / unit)
    if pieces < len(weights):
        raise PlacementError(
            f"{total} {axis} in units of {unit} make {pieces} pieces, but there are {len(weights)} ranks",
            hint=f"use at most {pieces} ranks for this model, or another --strategy",
        )
    sizes = [max(1, int(pieces * weight / sum(weights))) for weight in weights]
    largest = sorted(range(len(weights)), key=lambda rank: -weights[rank])
    for rank in itertools.cycle(largest):
        left = pieces - sum(sizes)
        if left == 0:
            break
        if left > 0 or sizes[rank] > 1:
            sizes[rank] += 1 if left > 0 else -1
    bounds = [min(bound * unit, total) for bound in itertools.accumulate(sizes, initial=0)]
    return [Range(start, stop) for start, stop in itertools.pairwise(bounds)]

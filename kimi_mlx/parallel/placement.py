"""Who holds what: a placement is data, made from the dimensions, a strategy and the weights of the ranks.

A strategy is a name for a way to divide; collectives are those of one token:

    hybrid     rows of every expert and MLP, rows of the head; attention on every rank    one sum a layer
    tensor     as hybrid, and the attention heads                                         two sums a layer
    expert     whole experts, rows of shared experts and dense MLPs, rows of the head     one sum a layer
    pipeline   layers; rank 0 has the embedding and the head, too                         one hand-over a rank

The embedding is never divided: that would cost a collective a token, to save a thousandth of the weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, Literal, get_args

from kimi_mlx.errors import PlacementError, UsageError
from kimi_mlx.model.config import ModelConfig

StrategyName = Literal["hybrid", "tensor", "expert", "pipeline"]

STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)

MAX_WEIGHT = 1 << 20
"""Of one rank in a strategy: enough for gigabytes, and for megabytes."""


@dataclass(frozen=True)
class Range:
    """Places start (included) to stop (excluded)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class RankShare:
    """What one rank holds, in terms of the unquantized, undivided model.

    Args:
        layers: of num_hidden_layers.
        heads: of num_attention_heads.
        experts: of n_routed_experts, whole ones.
        expert_rows: of moe_intermediate_size, in each of these, and in the shared experts fused with them.
        shared_rows: of the shared experts, where they are not fused with the routed ones.
        dense_rows: of intermediate_size.
        embed_rows: of vocab_size, in the embedding.
        vocab_rows: of vocab_size, in the head; the last norm goes with it.
    """

    layers: Range
    heads: Range
    experts: Range
    expert_rows: Range
    shared_rows: Range
    dense_rows: Range
    embed_rows: Range
    vocab_rows: Range

    def range_of(self, name: str) -> Range:
        """The span called `name`."""
        return getattr(self, name)


@dataclass(frozen=True)
class Placement:
    """The shares of all ranks.

    Args:
        strategy: its name, with the weights of the ranks if they differ: `hybrid`, `tensor:3:1`.
        shares: of the ranks in their order.
    """

    strategy: str
    shares: tuple[RankShare, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.shares)

    def is_sharded(self, name: str) -> bool:
        """Whether ranks hold different spans of this name."""
        return len({share.range_of(name) for share in self.shares}) > 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON: spans become pairs."""
        shares = [{item.name: [span.start, span.stop] for item, span in _spans(share)} for share in self.shares]
        return {"strategy": self.strategy, "shares": shares}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Placement:
        """Read what to_dict has written; KeyError, TypeError or ValueError for anything else."""
        shares = (
            RankShare(**{name: Range(*map(int, span)) for name, span in share.items()}) for share in value["shares"]
        )
        return cls(str(value["strategy"]), tuple(shares))

    @property
    def digest(self) -> str:
        """A short name that tells placements of equal strategy and size apart."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:6]


def _spans(share: RankShare) -> list[tuple[Field[Any], Range]]:
    return [(item, share.range_of(item.name)) for item in fields(share)]


@dataclass(frozen=True)
class SplitGranularity:
    """The smallest piece of each axis that can be held alone: what makes a whole quantization group, or one.

    None where a checkpoint has no such matrices.

    Args:
        heads: attention heads, by the columns of the output projections.
        expert: rows of an expert, by the columns of the experts' down projections.
        shared: of the shared experts' down projections.
        dense: of the dense layers' down projections.
    """

    heads: int | None = 1
    expert: int | None = 1
    shared: int | None = 1
    dense: int | None = 1


def parse_strategy(text: str) -> tuple[StrategyName, tuple[int, ...]]:
    """A strategy's name and the weights of its ranks, as far as they are given.

    Args:
        text: such as `hybrid`, or `hybrid:512:128` for two ranks of unequal memory.

    Raises:
        UsageError: no such strategy, or weights that are no whole numbers from 1.
    """
    name, *parts = text.split(":")
    if name not in STRATEGIES:
        raise UsageError(f"there is no strategy `{name}`", hint=f"use one of {', '.join(STRATEGIES)}")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= MAX_WEIGHT for part in parts):
        raise UsageError(
            f"`{text}` gives no weight to each rank",
            hint=f"write whole numbers up to {MAX_WEIGHT}, one a rank: `--strategy {name}:3:1`",
        )
    return name, tuple(map(int, parts))


def normalize_strategy(text: str, world_size: int) -> str:
    """The one way to write a strategy: without equal weights, without common factors; `hybrid` for one rank.

    Raises:
        UsageError: as parse_strategy; or weights of more or fewer ranks.
    """
    name, weights = parse_strategy(text)
    if weights and len(weights) != world_size:
        raise UsageError(
            f"`{text}` gives weights to {len(weights)} ranks, but there are {world_size}",
            hint=f"give one weight a rank, or none: `--strategy {name}`",
        )
    if world_size == 1:
        return "hybrid"
    if len(set(weights)) == 1:
        return name
    factor = math.gcd(*weights)
    return ":".join([name, *(str(weight // factor) for weight in weights)])


def place(config: ModelConfig, strategy: str, world_size: int, granularity: SplitGranularity) -> Placement:
    """Divide in proportion to the weights, as far as the units allow.

    Args:
        config: the model's dimensions.
        strategy: as in parse_strategy.
        world_size: number of ranks.
        units: of the checkpoint.

    Raises:
        PlacementError: a rank would hold nothing of some matrix.
        UsageError: as normalize_strategy.
    """
    strategy = normalize_strategy(strategy, world_size)
    name, weights = parse_strategy(strategy)
    is_sharded = {field: field in SHARDED_AXES[name] for field in (each.name for each in fields(RankShare))}

    def spans(field: str, total: int, unit: int | None, what: str) -> list[Range]:
        if not is_sharded[field]:
            return [Range(0, total)] * world_size
        return split_proportionally(total, unit, weights or (1,) * world_size, what)

    width = config.moe_intermediate_size
    columns = {
        "layers": spans("layers", config.num_hidden_layers, 1, "layers"),
        "heads": spans("heads", config.num_attention_heads, granularity.heads, "heads"),
        "experts": spans("experts", config.n_routed_experts, 1, "experts"),
        "expert_rows": spans("expert_rows", width, granularity.expert, "expert rows"),
        "shared_rows": spans(
            "shared_rows", width * max(config.n_shared_experts, 1), granularity.shared, "shared expert rows"
        ),
        "dense_rows": spans("dense_rows", config.intermediate_size, granularity.dense, "dense rows"),
        "embed_rows": [Range(0, config.vocab_size)] * world_size,
        "vocab_rows": spans("vocab_rows", config.vocab_size, 1, "rows of the vocabulary"),
    }
    if name == "pipeline":
        elsewhere = [Range(0, 0)] * (world_size - 1)
        columns["embed_rows"][1:] = columns["vocab_rows"][1:] = elsewhere
    shares = tuple(
        RankShare(**{field: column[rank] for field, column in columns.items()}) for rank in range(world_size)
    )
    return Placement(strategy, shares)


SHARDED_AXES: Mapping[StrategyName, frozenset[str]] = {
    "hybrid": frozenset({"expert_rows", "shared_rows", "dense_rows", "vocab_rows"}),
    "tensor": frozenset({"heads", "expert_rows", "shared_rows", "dense_rows", "vocab_rows"}),
    "expert": frozenset({"experts", "shared_rows", "dense_rows", "vocab_rows"}),
    "pipeline": frozenset({"layers"}),
}
"""The spans of a RankShare in which the ranks of a strategy differ; of those in which they do not, each has all."""


def split_proportionally(total: int, unit: int | None, weights: Sequence[float], what: str) -> list[Range]:
    """Cut `total` into consecutive spans of whole units, in proportion to the weights, at least a unit each.

    Sizes are rounded down, and what is left goes to the largest: a small rank gets no more than fits. Without a unit
    there is nothing to split_proportionally, and the spans are empty.

    Args:
        total: what is divided.
        unit: the smallest piece; the last span may end with a part of one.
        weights: one a rank, above 0.
        what: is divided, for messages.

    Raises:
        PlacementError: fewer units than ranks.
    """
    if unit is None:
        return [Range(0, 0)] * len(weights)
    pieces = math.ceil(total / unit)
    if pieces < len(weights):
        raise PlacementError(
            f"{total} {what} in groups of {unit} make {pieces} pieces, too few for {len(weights)} ranks",
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

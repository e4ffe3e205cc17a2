"""Which part of a model each rank holds, by strategy, as fractions; uneven ones follow the hosts' memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kimi_mlx.errors import PlacementError
from kimi_mlx.planner.constants import Strategy
from kimi_mlx.planner.shape import Parts, Shape

ROW_GROUP = 64
"""Rows of an expert or a dense MLP are divided in whole quantization groups of their down projections."""


@dataclass(frozen=True)
class Portion:
    """A rank's fractions of each part, of the layers that it has.

    Args:
        layers: how many layers.
        moe_layers: how many of them have experts.
        embedding: of the embedding.
        head: of the head's rows.
        heads: of the attention heads.
        expert_rows: of the rows of each routed expert that it holds.
        experts: of the routed experts, whole ones.
        other_rows: of the rows of shared experts and dense MLPs.
    """

    layers: int
    moe_layers: int
    embedding: float = 1
    head: float = 1
    heads: float = 1
    expert_rows: float = 1
    experts: float = 1
    other_rows: float = 1

    def held(self, parts: Parts, shape: Shape) -> float:
        """Bytes, or values, of all that it holds."""
        routed = self.moe_layers * shape.config.n_routed_experts * self.experts * self.expert_rows * parts.expert
        return self.embedding * parts.embedding + self.head * parts.head + self.fixed(parts) + routed

    def fixed(self, parts: Parts) -> float:
        """Of that, what every token uses: all but embedding, head and routed experts."""
        return (
            self.layers * (parts.latent + self.heads * (parts.heads + parts.expansion))
            + self.moe_layers * (parts.router + self.other_rows * parts.shared)
            + (self.layers - self.moe_layers) * self.other_rows * parts.dense
        )


def divide_by(total: int, weights: Sequence[float], what: str, unit: int = 1) -> list[int]:
    """Cut `total` into pieces of whole units, proportional to the weights, at least a unit each.

    Pieces are rounded down, and what is left goes to the largest: a small host gets no more than fits.

    Raises:
        PlacementError: fewer units than weights.
    """
    units = -(-total // unit)
    if units < len(weights):
        raise PlacementError(
            f"{total} {what} in groups of {unit} make {units} pieces, too few for {len(weights)} ranks",
            hint=f"use at most {units} ranks for this model",
        )
    pieces = [max(1, int(units * weight / sum(weights))) for weight in weights]
    largest = sorted(range(len(weights)), key=lambda rank: -weights[rank])
    for rank in itertools.cycle(largest):
        left = units - sum(pieces)
        if left == 0:
            break
        if left > 0 or pieces[rank] > 1:
            pieces[rank] += 1 if left > 0 else -1
    sizes = [piece * unit for piece in pieces]
    sizes[largest[-1]] -= units * unit - total
    return sizes


def make_portions(
    strategy: Strategy, shape: Shape, weights: Sequence[float], slices_head: bool = True
) -> list[Portion]:
    """The portion of each rank.

    Args:
        strategy: how to divide.
        shape: of the model.
        weights: one a rank; shares are proportional to them.
        slices_head: whether ranks share the rows of the vocabulary, where the strategy lets them.

    Raises:
        PlacementError: more ranks than there is to divide.
    """
    if strategy == "single":
        return [Portion(shape.layers, shape.moe_layers)]
    if strategy == "pipeline":
        return _pipeline(shape, weights)
    config = shape.config

    def fractions(total: int, what: str, unit: int = 1) -> list[float]:
        return [piece / total for piece in divide_by(total, weights, what, unit)]

    whole = [1.0] * len(weights)
    dense_rows = fractions(config.intermediate_size, "dense rows", ROW_GROUP)
    head = fractions(config.vocab_size, "rows of the vocabulary") if slices_head else whole
    heads = fractions(config.num_attention_heads, "heads") if strategy == "tensor" else whole
    if strategy == "expert":
        expert_rows, experts = whole, fractions(config.n_routed_experts, "experts")
    else:
        expert_rows, experts = fractions(config.moe_intermediate_size, "expert rows", _row_unit(shape, weights)), whole
    return [
        Portion(
            shape.layers,
            shape.moe_layers,
            head=head[rank],
            heads=heads[rank],
            expert_rows=expert_rows[rank],
            experts=experts[rank],
            other_rows=dense_rows[rank],
        )
        for rank in range(len(weights))
    ]


def _row_unit(shape: Shape, weights: Sequence[float]) -> int:
    """Small models have experts with fewer groups than ranks; their groups are smaller, too."""
    return ROW_GROUP if shape.config.moe_intermediate_size >= ROW_GROUP * len(weights) else 1


def _pipeline(shape: Shape, weights: Sequence[float]) -> list[Portion]:
    counts = divide_by(shape.layers, weights, "layers")
    portions: list[Portion] = []
    start = 0
    for rank, count in enumerate(counts):
        moe = sum(map(shape.config.is_moe_layer, range(start, start + count)))
        is_last = rank == len(counts) - 1
        portions.append(Portion(count, moe, embedding=float(rank == 0), head=float(is_last)))
        start += count
    return portions

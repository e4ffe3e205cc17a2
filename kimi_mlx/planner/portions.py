"""Each rank's share of a model, as fractions of its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kimi_mlx.parallel.placement import Placement, RankShare, SplitGranularity, place
from kimi_mlx.planner.model_shape import GROUP_SIZE, ModelShape, PartSizes

ROW_GROUP = GROUP_SIZE
"""Number of rows of a quantization group, which cannot be split between ranks. The default is assumed, because the
planner works without a checkpoint."""


@dataclass(frozen=True)
class Portion:
    """A rank's fraction of each part, in the layers that it holds.

    Args:
        layers: number of layers.
        moe_layers: number of these layers with experts.
        embedding: fraction of the embedding.
        head: fraction of the head's rows.
        heads: fraction of the attention heads.
        expert_rows: fraction of the rows of each routed expert on the rank.
        experts: fraction of the routed experts, as whole experts.
        shared_rows: fraction of the rows of the shared experts.
        dense_rows: fraction of the rows of the dense MLPs.
        vision: fraction of the vision tower: all or nothing.
    """

    layers: int
    moe_layers: int
    embedding: float = 1
    head: float = 1
    heads: float = 1
    expert_rows: float = 1
    experts: float = 1
    shared_rows: float = 1
    dense_rows: float = 1
    vision: float = 1

    def held(self, parts: PartSizes, shape: ModelShape) -> float:
        """Return the bytes, or values, of everything on the rank."""
        routed = self.moe_layers * shape.config.n_routed_experts * self.experts * self.expert_rows * parts.expert
        ends = self.embedding * parts.embedding + self.head * parts.head + self.vision * parts.vision
        return ends + self.fixed(parts) + routed

    def fixed(self, parts: PartSizes) -> float:
        """Return the bytes, or values, that every token uses: all except ends, vision tower and routed experts."""
        return (
            self.layers * (parts.latent + self.heads * (parts.heads + parts.expansion))
            + self.moe_layers * (parts.router + self.shared_rows * parts.shared)
            + (self.layers - self.moe_layers) * self.dense_rows * parts.dense
        )


def make_portions(strategy: str, shape: ModelShape, ranks: int, slices_head: bool = True) -> list[Portion]:
    """Return the portion of each rank, as kimi-mlx places the model.

    Args:
        strategy: strategy as in kimi_mlx.parallel.placement, with weights for uneven shares; ignored for one rank.
        shape: the model.
        ranks: number of ranks.
        slices_head: whether the rows of the head are split; if not, a rank that has any row has all rows.

    Raises:
        PlacementError: too many ranks for this model and strategy.
    """
    portions = [portion_of(share, shape) for share in plan_placement(strategy, shape, ranks).shares]
    return portions if slices_head else [replace(portion, head=math.ceil(portion.head)) for portion in portions]


def plan_placement(strategy: str, shape: ModelShape, ranks: int) -> Placement:
    """Return the placement of a model whose checkpoint is not known; no split divides a group of ROW_GROUP rows.

    Args:
        strategy: strategy as in kimi_mlx.parallel.placement, with weights for uneven shares; ignored for one rank.
        shape: the model.
        ranks: number of ranks.

    Raises:
        PlacementError: too many ranks for this model and strategy.
    """
    return place(shape.config, "hybrid" if ranks == 1 else strategy, ranks, _granularity(shape, ranks))


def portion_of(share: RankShare, shape: ModelShape) -> Portion:
    """Return a rank's share as fractions of the model's parts."""
    config = shape.config
    layers = range(share.layers.start, share.layers.stop)
    return Portion(
        layers=len(layers),
        moe_layers=sum(map(config.is_moe_layer, layers)),
        embedding=len(share.embed_rows) / config.vocab_size,
        head=len(share.vocab_rows) / config.vocab_size,
        heads=len(share.heads) / config.num_attention_heads,
        expert_rows=len(share.expert_rows) / config.moe_intermediate_size,
        experts=len(share.experts) / config.n_routed_experts,
        shared_rows=len(share.shared_rows) / (config.moe_intermediate_size * max(config.n_shared_experts, 1)),
        dense_rows=len(share.dense_rows) / config.intermediate_size,
        vision=int(share.has_vision),
    )


def _granularity(shape: ModelShape, ranks: int) -> SplitGranularity:
    """Return the granularity of a split: whole quantization groups; smaller ones if the model is too small for that."""
    config = shape.config

    def unit(total: int, size: int) -> int:
        return size if total >= size * ranks else 1

    return SplitGranularity(
        heads=unit(config.num_attention_heads, ROW_GROUP // math.gcd(ROW_GROUP, config.v_head_dim)),
        expert=unit(config.moe_intermediate_size, ROW_GROUP),
        shared=unit(config.moe_intermediate_size * max(config.n_shared_experts, 1), ROW_GROUP),
        dense=unit(config.intermediate_size, ROW_GROUP),
    )

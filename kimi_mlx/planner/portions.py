"""Which part of a model each rank of a placement holds, as fractions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kimi_mlx.parallel.placement import Share, Units, place
from kimi_mlx.planner.model_shape import ModelShape, PartSizes

ROW_GROUP = 64
"""Values in a quantization group, which no rank can have a part of, where the checkpoint is not here to tell."""


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
        shared_rows: of the rows of the shared experts.
        dense_rows: of the rows of the dense MLPs.
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

    def held(self, parts: PartSizes, shape: ModelShape) -> float:
        """Bytes, or values, of all that it holds."""
        routed = self.moe_layers * shape.config.n_routed_experts * self.experts * self.expert_rows * parts.expert
        return self.embedding * parts.embedding + self.head * parts.head + self.fixed(parts) + routed

    def fixed(self, parts: PartSizes) -> float:
        """Of that, what every token uses: all but embedding, head and routed experts."""
        return (
            self.layers * (parts.latent + self.heads * (parts.heads + parts.expansion))
            + self.moe_layers * (parts.router + self.shared_rows * parts.shared)
            + (self.layers - self.moe_layers) * self.dense_rows * parts.dense
        )


def make_portions(strategy: str, shape: ModelShape, ranks: int, slices_head: bool = True) -> list[Portion]:
    """The portion of each rank, as kimi-mlx places the model.

    Args:
        strategy: as in kimi_mlx.parallel.placement, with weights for uneven shares; any for one rank, which has all.
        shape: of the model.
        ranks: how many.
        slices_head: whether ranks share the rows of the vocabulary; if not, each that has some of them has all.

    Raises:
        PlacementError: more ranks than there is to divide.
    """
    placement = place(shape.config, "hybrid" if ranks == 1 else strategy, ranks, _units(shape, ranks))
    portions = [_portion(share, shape) for share in placement.shares]
    return portions if slices_head else [replace(each, head=math.ceil(each.head)) for each in portions]


def _portion(share: Share, shape: ModelShape) -> Portion:
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
    )


def _units(shape: ModelShape, ranks: int) -> Units:
    """Whole groups of the matrices' columns; a model too small for that has smaller groups, too."""
    config = shape.config

    def unit(total: int, size: int) -> int:
        return size if total >= size * ranks else 1

    return Units(
        heads=unit(config.num_attention_heads, ROW_GROUP // math.gcd(ROW_GROUP, config.v_head_dim)),
        expert=unit(config.moe_intermediate_size, ROW_GROUP),
        shared=unit(config.moe_intermediate_size * max(config.n_shared_experts, 1), ROW_GROUP),
        dense=unit(config.intermediate_size, ROW_GROUP),
    )

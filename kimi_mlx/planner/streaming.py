"""Plan the experts that are read from the SSD: share that each rank keeps in memory, and rate of its SSD."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kimi_mlx.errors import MemoryLimitError
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import Portion
from kimi_mlx.sizing.draft import DraftMemory
from kimi_mlx.sizing.engine_limits import bytes_beside_weights, planned_context, streamed_chunk
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.sizing.experts import ExpertSizes
from kimi_mlx.sizing.kv_cache import BFLOAT16_BYTES, kv_bytes_per_token
from kimi_mlx.sizing.prefill import RankShape
from kimi_mlx.sizing.streaming import ZIPF_EXPONENT, expected_misses, hit_rate

Limit = Literal["default", "raised", "none"]
"""Limit of the GPU's memory: the current one, the one with `iogpu.wired_limit_mb` raised, or none, for options that do
not fit."""


@dataclass(frozen=True)
class RankExperts:
    """Routed experts of a rank.

    Args:
        sizes: sizes of the rank's share.
        budget_bytes: memory for experts, staging area included; None if all stay in memory.
        ssd_bytes_per_s: rate at which the others are read.
    """

    sizes: ExpertSizes
    budget_bytes: int | None
    ssd_bytes_per_s: float

    @property
    def kept_share(self) -> float:
        """Fraction of the rank's experts that stay in memory."""
        return self.sizes.num_kept(self.budget_bytes) / max(self.sizes.num_experts, 1)

    @property
    def kept_bytes(self) -> int:
        """Memory for experts."""
        return self.sizes.all_bytes if self.budget_bytes is None else self.budget_bytes


@dataclass(frozen=True)
class Streaming:
    """Experts of all ranks; at least one rank reads some from its SSD.

    Args:
        ranks: experts of each rank.
        chunk: number of prompt tokens per step.
        exponent: assumed exponent of the experts' popularity (kimi_mlx.sizing.streaming).
    """

    ranks: tuple[RankExperts, ...]
    chunk: int
    exponent: float = ZIPF_EXPONENT

    @property
    def kept_share(self) -> float:
        """Fraction of the model's experts that stay in memory, on all ranks together."""
        kept = sum(rank.kept_share * rank.sizes.all_bytes for rank in self.ranks)
        return kept / self.all_bytes

    @property
    def all_bytes(self) -> int:
        """Size of the routed experts of all ranks."""
        return sum(rank.sizes.all_bytes for rank in self.ranks)

    @property
    def kept_bytes(self) -> int:
        """Memory for experts, on all ranks together."""
        return sum(rank.kept_bytes for rank in self.ranks)

    @property
    def smallest(self) -> Streaming:
        """The same ranks with the minimum memory for experts."""
        ranks = (
            rank if rank.budget_bytes is None else replace(rank, budget_bytes=rank.sizes.staging_bytes)
            for rank in self.ranks
        )
        return replace(self, ranks=tuple(ranks))

    def misses(self, rank: int, shape: ModelShape, tokens: int) -> float:
        """Return the expected number of distinct experts of a layer that `tokens` tokens choose and a rank must read.

        Counted over all experts of the layer, also if the rank holds only some of them.
        """
        config = shape.config
        kept = self.ranks[rank].kept_share * config.n_routed_experts
        return expected_misses(config.n_routed_experts, config.num_experts_per_tok, kept, tokens, self.exponent)

    def hit_rate(self, shape: ModelShape) -> float:
        """Return the expected share of a token's chosen experts that are in memory, over all ranks."""
        config = shape.config
        hits = sum(
            rank.sizes.all_bytes
            * hit_rate(
                config.n_routed_experts,
                config.num_experts_per_tok,
                rank.kept_share * config.n_routed_experts,
                self.exponent,
            )
            for rank in self.ranks
        )
        return hits / self.all_bytes

    def token_read_bytes(self, shape: ModelShape) -> float:
        """Return the bytes that a token reads from all SSDs together."""
        token_bytes = self.all_bytes * shape.config.num_experts_per_tok / shape.config.n_routed_experts
        return (1 - self.hit_rate(shape)) * token_bytes


def uniform(streaming: Streaming) -> Streaming:
    """Return the same with all experts equally popular, which has the fewest hits."""
    return replace(streaming, exponent=0.0)


def plan_streaming(
    machines: Sequence[Machine],
    portions: Sequence[Portion],
    shape: ModelShape,
    context: int,
    setting: ExpertMemory,
    draft: DraftMemory | None = None,
    limit: Limit = "default",
) -> Streaming | None:
    """Return the experts that each rank keeps in memory; None if all of them stay there, or if the model does not fit.

    Args:
        machines: one machine per rank.
        portions: portion of each rank.
        shape: the model.
        context: number of tokens in the cache.
        setting: the user's setting.
        draft: memory of the draft model on rank 0; None without one.
        limit: limit of the GPU's memory.
    """
    ranks: list[RankExperts] = []
    chunks: list[int] = []
    for machine, portion in zip(machines, portions, strict=True):
        sizes = portion_sizes(portion, shape)
        free_bytes = machine.gpu_bytes if limit == "default" else machine.raised_gpu_bytes
        if draft is not None and not ranks:
            free_bytes -= draft.total_bytes(context)
        rank_shape = planned_rank_shape(portion, shape)
        chunk = streamed_chunk(shape.config, rank_shape, free_bytes - sizes.rest_bytes)
        cache_bytes = max(context, planned_context(shape.config)) * kv_bytes_per_token(shape.config, portion.layers)
        other_bytes = bytes_beside_weights(shape.config, rank_shape, portion.layers, chunk, cache_bytes)
        try:
            budget = sizes.budget(setting, sys.maxsize if limit == "none" else free_bytes, other_bytes)
        except MemoryLimitError:
            return None
        ranks.append(RankExperts(sizes, budget, machine.ssd.bytes_per_s))
        chunks.append(chunk)
    if all(rank.budget_bytes is None for rank in ranks):
        return None
    return Streaming(tuple(ranks), min(chunks))


def portion_sizes(portion: Portion, shape: ModelShape) -> ExpertSizes:
    """Return the sizes of a rank's share."""
    one = round(portion.expert_rows * shape.bytes.expert)
    held = round(portion.experts * shape.config.n_routed_experts)
    rest = portion.held(shape.bytes, shape) - portion.moe_layers * held * portion.expert_rows * shape.bytes.expert
    return ExpertSizes(round(rest), (one,) * portion.moe_layers, held, shape.config.num_experts_per_tok)


def planned_rank_shape(portion: Portion, shape: ModelShape) -> RankShape:
    """Return the dimensions of a rank's share that determine the memory of prefill, on a Mac."""
    return RankShape(
        heads=round(shape.config.num_attention_heads * portion.heads),
        expert_rows=round(shape.config.moe_intermediate_size * portion.expert_rows),
        value_bytes=BFLOAT16_BYTES,
        is_fused=True,
    )

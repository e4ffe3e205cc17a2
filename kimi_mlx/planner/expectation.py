"""Predict the speed of a loaded model with some of its experts on the SSD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kimi_mlx.errors import PlacementError
from kimi_mlx.planner.constants import FAST_FENCE_S, FENCE_S, FITTED, KIMI_MLX, Strategy
from kimi_mlx.planner.links import RDMA, TCP
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.planner.speed import Setup, decode
from kimi_mlx.planner.streaming import RankExperts, Streaming, portion_sizes
from kimi_mlx.sizing.experts import ExpertBudget
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS
from kimi_mlx.sizing.streaming import ZIPF_EXPONENT


@dataclass(frozen=True)
class Expectation:
    """Prediction for a model with some of its experts on the SSD.

    Args:
        kept_share: fraction of the experts in memory.
        kept_bytes: size of the experts in memory, on all ranks together.
        all_bytes: size of all experts.
        hit_rate: expected share of the chosen experts that are in memory.
        zipf_exponent: exponent of the experts' popularity that this assumes.
        decode_tok_per_s: decode rate of one sequence; None if a chip is not known.
        max_sequences: number of sequences that run at the same time.
        prefill_chunk: number of prompt tokens per step.
    """

    kept_share: float
    kept_bytes: int
    all_bytes: int
    hit_rate: float
    zipf_exponent: float
    decode_tok_per_s: float | None
    max_sequences: int
    prefill_chunk: int

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return asdict(self)


def expect(
    shape: ModelShape,
    strategy: str,
    machines: Sequence[Machine],
    budgets: Sequence[ExpertBudget],
    *,
    has_rdma: bool = False,
    is_fast_sync: bool = False,
) -> Expectation | None:
    """Predict a loaded model; return None if the planner does not support the split.

    Args:
        shape: the model.
        strategy: strategy of the split; ignored for one rank.
        machines: machine of each rank.
        budgets: memory for experts of each rank.
        has_rdma: whether the ranks are connected by RDMA.
        is_fast_sync: whether MLX_METAL_FAST_SYNCH=1 is set.
    """
    try:
        portions = make_portions(strategy, shape, len(budgets))
    except PlacementError:
        return None
    ranks = tuple(
        RankExperts(portion_sizes(portion, shape), budget.budget_bytes, machine.ssd.bytes_per_s)
        for portion, budget, machine in zip(portions, budgets, machines, strict=True)
    )
    limits = budgets[0].limits
    streaming = Streaming(ranks, limits.chunk)
    name: Strategy = "single" if len(budgets) == 1 else strategy.partition(":")[0]  # pyright: ignore[reportAssignmentType]
    link = None if len(budgets) == 1 else RDMA if has_rdma else TCP
    fence_s = FAST_FENCE_S if is_fast_sync else FENCE_S
    rate = None
    if all(machine.is_known for machine in machines):
        setup = Setup(shape, name, machines, portions, link, KIMI_MLX, fence_s, FITTED, streaming=streaming)
        rate = 1 / decode(setup, min(CONTEXT_TOKENS, shape.context_tokens)).total_s
    all_bytes = sum(budget.all_bytes for budget in budgets)
    kept = sum(budget.kept_share * budget.all_bytes for budget in budgets)
    return Expectation(
        kept_share=kept / all_bytes if all_bytes else 1.0,
        kept_bytes=round(kept),
        all_bytes=all_bytes,
        hit_rate=streaming.hit_rate(shape),
        zipf_exponent=ZIPF_EXPONENT,
        decode_tok_per_s=rate,
        max_sequences=limits.sequences,
        prefill_chunk=limits.chunk,
    )

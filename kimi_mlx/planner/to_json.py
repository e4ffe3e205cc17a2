"""Convert a plan, its cost and the backtest to JSON. Within a `version`, fields are only added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kimi_mlx.planner.backtest import Comparison, left_out, median_error
from kimi_mlx.planner.constants import FAST_FENCE_S, FENCE_S, FITTED
from kimi_mlx.planner.cost import Cost
from kimi_mlx.planner.drafts import DraftShape
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.reasons import rejection_reason
from kimi_mlx.planner.search import ANSWER_TOKENS, PROMPT_TOKENS, Option, Plan, StreamedOption
from kimi_mlx.planner.speed import DraftedDecode, TimeBreakdown
from kimi_mlx.sizing.kv_cache import kv_bytes_per_token
from kimi_mlx.sizing.streaming import GUESSED_SHARE, SYNC_S, ZIPF_EXPONENT

VERSION = 4


def plan_to_dict(plan: Plan, cost: Cost | None = None) -> dict[str, Any]:
    """Return the whole plan. `choice` is an index into `options`, null if nothing fits."""
    return {
        "version": VERSION,
        "model": {
            "name": plan.shape.name,
            "weights_bytes": round(plan.shape.weights_bytes),
            "cache_bytes_per_token": kv_bytes_per_token(plan.shape.config),
            "context_tokens": plan.shape.context_tokens,
        },
        "machines": [_machine(machine) for machine in plan.machines],
        "context": plan.context,
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "is_fast_sync": plan.is_fast_sync,
        "constants": {**asdict(FITTED), "fence_s": FAST_FENCE_S if plan.is_fast_sync else FENCE_S},
        "options": [_option(option, plan) for option in plan.options],
        "choice": None if plan.choice is None else plan.options.index(plan.choice),
        "notes": list(plan.notes),
        "cost": None if cost is None else asdict(cost),
        "first_token_prompt": plan.first_token_prompt,
        "draft": None if plan.draft is None else _draft(plan.draft),
        "expert_memory": str(plan.expert_memory),
        "streaming": {
            "popularity": "zipf",
            "zipf_exponent": ZIPF_EXPONENT,
            "sync_s": SYNC_S,
            "guessed_share": GUESSED_SHARE,
        },
    }


def backtest_to_dict(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return all comparisons, and the median errors: of all with their experts in memory, of those not fitted, of those
    with new set-ups, and of those with experts on the SSD."""
    resident = [comparison for comparison in comparisons if not comparison.is_streamed]
    return {
        "version": VERSION,
        "constants": asdict(FITTED),
        "rows": [
            {
                **asdict(comparison.row),
                "metric": comparison.metric,
                "published_tok_per_s": comparison.published,
                "predicted_tok_per_s": comparison.predicted,
                "error": comparison.error,
            }
            for comparison in comparisons
        ],
        "median_error": median_error(resident),
        "median_error_not_fitted": median_error(comparison for comparison in resident if not comparison.row.fit),
        "median_error_new": median_error(comparison for comparison in comparisons if comparison.is_new),
        "median_error_streamed": median_error(comparison for comparison in comparisons if comparison.is_streamed),
        "left_out": [{"measurement": measurement, "reason": reason} for measurement, reason in left_out()],
    }


def _machine(machine: Machine) -> dict[str, Any]:
    return {
        "name": machine.name,
        "memory_bytes": machine.memory_bytes,
        "gpu_bytes": machine.gpu_bytes,
        "raised_gpu_bytes": machine.raised_gpu_bytes,
        "price_usd": machine.price_usd,
        "ssd": asdict(machine.ssd),
        "chip": {**asdict(machine.chip), "memory_gb": list(machine.chip.memory_gb)},
    }


def _option(option: Option, plan: Plan) -> dict[str, Any]:
    return {
        "strategy": option.strategy,
        "placement": option.placement,
        "shares": option.shares,
        "hosts": list(option.hosts),
        "backend": None if option.link is None else option.link.backend,
        "link": None if option.link is None else asdict(option.link),
        "fits": option.fits,
        "memory": [{**asdict(host), "needed_bytes": host.needed_bytes} for host in option.memory],
        "longest_context": option.longest_context,
        "longest_context_raised": option.longest_context_raised,
        "decode": {"tok_per_s": option.decode_tok_per_s, **_seconds(option.decode)},
        "prefill": {"tok_per_s": option.prefill_tok_per_s, **_seconds(option.prefill)},
        "request_s": option.request_s,
        "rejection_reason": rejection_reason(option, plan),
        "first_token_s": option.first_token_s,
        "load_s": option.load_s,
        "drafted": None if option.drafted is None else _drafted(option.drafted),
        "experts": None if option.experts is None else _experts(option.experts),
    }


def _experts(experts: StreamedOption) -> dict[str, Any]:
    streaming = experts.streaming
    return {
        "kept_share": streaming.kept_share,
        "kept_bytes": streaming.kept_bytes,
        "all_bytes": streaming.all_bytes,
        "hit_rate": experts.hit_rate,
        "token_read_bytes": experts.token_read_bytes,
        "prefill_chunk": streaming.chunk,
        "uniform_hit_rate": experts.uniform_hit_rate,
        "uniform_tok_per_s": experts.uniform_tok_per_s,
        "raised_kept_share": experts.raised_kept_share,
        "raised_tok_per_s": experts.raised_tok_per_s,
        "ranks": [
            {
                "kept_share": rank.kept_share,
                "budget_bytes": rank.budget_bytes,
                "expert_bytes": max(rank.sizes.expert_bytes, default=0),
                "ssd_bytes_per_s": rank.ssd_bytes_per_s,
            }
            for rank in streaming.ranks
        ],
    }


def _draft(draft: DraftShape) -> dict[str, Any]:
    return {
        "name": draft.name,
        "tokens_per_step": draft.tokens_per_step,
        "most_drafted": draft.most_drafted,
        "source": draft.source,
    }


def _drafted(drafted: DraftedDecode) -> dict[str, Any]:
    return {
        "tok_per_s": drafted.tok_per_s,
        "drafted": drafted.drafted,
        "tokens_per_step": drafted.tokens_per_step,
        **_seconds(drafted.step),
    }


def _seconds(parts: TimeBreakdown) -> dict[str, float]:
    return {**asdict(parts), "total_s": parts.total_s}

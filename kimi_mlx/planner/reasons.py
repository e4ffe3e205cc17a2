"""Explain in one line why an option was not chosen."""

from __future__ import annotations

from kimi_mlx.planner.search import Option, Plan
from kimi_mlx.planner.speed import TimeBreakdown
from kimi_mlx.units import format_gib

DESCRIPTIONS = {
    "read_s": "takes {} longer to read weights",
    "compute_s": "takes {} longer in attention",
    "kernels_s": "takes {} longer to dispatch kernels",
    "fences_s": "waits {} longer for fences",
    "link_s": "waits {} longer for the link",
    "draft_s": "takes {} longer to draft",
    "ssd_s": "waits {} longer for the SSD",
    "syncs_s": "waits {} longer for the router",
}
"""Part of the time per token -> its description."""


def rejection_reason(option: Option, plan: Plan) -> str | None:
    """Return why `option` was not chosen; None for the choice itself."""
    choice = plan.choice
    if option is choice:
        return None
    if option.fits == "no" or choice is None:
        return _too_large(option)
    if option.request_s < choice.request_s and option.strategy == "pipeline":
        return "predicted only slightly faster, and real pipelines have been slower than predicted"
    percent = 100 * (option.request_s / choice.request_s - 1)
    slower = f"takes {percent:.0f} % longer" if percent >= 1 else "about as fast"
    return f"{slower}: {_largest_difference(option, choice)}"


def _too_large(option: Option) -> str:
    worst = max(option.memory, key=lambda host: host.needed_bytes - host.raised_gpu_bytes)
    limit, smallest = format_gib(worst.raised_gpu_bytes), format_gib(worst.smallest_bytes)
    if worst.smallest_bytes < worst.needed_bytes and worst.smallest_bytes > worst.raised_gpu_bytes:
        return f"{worst.host} needs {smallest} even with experts on the SSD; its GPU can use {limit} at most"
    return f"{worst.host} needs {format_gib(worst.needed_bytes)}; its GPU can use {limit} at most"


def _largest_difference(option: Option, choice: Option) -> str:
    """Describe the part of a token's time, or the prefill, that is slowest compared to the choice."""
    decode = _differences(option.token, choice.token)
    name = max(decode, key=lambda part: decode[part])
    prompt_s = option.prefill.total_s - choice.prefill.total_s
    if decode[name] <= 0 or prompt_s > option.request_s - choice.request_s - prompt_s:
        return f"its prefill is slower ({option.prefill_tok_per_s:.0f} tok/s)"
    return f"each token {DESCRIPTIONS[name].format(f'{decode[name] * 1e3:.1f} ms')}"


def _differences(mine: TimeBreakdown, other: TimeBreakdown) -> dict[str, float]:
    return {part: getattr(mine, part) - getattr(other, part) for part in DESCRIPTIONS}

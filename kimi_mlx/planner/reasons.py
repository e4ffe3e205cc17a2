"""Why an option was not taken, in a line."""

from __future__ import annotations

from kimi_mlx.planner.search import Option, Plan
from kimi_mlx.planner.speed import TimeBreakdown
from kimi_mlx.units import GB

WORDS = {
    "read_s": "reads weights for {} more",
    "compute_s": "attends for {} more",
    "kernels_s": "dispatches kernels for {} more",
    "fences_s": "waits {} more for fences",
    "link_s": "waits {} more for the link",
}
"""Part of a token -> what is said of it."""


def why_lost(option: Option, plan: Plan) -> str | None:
    """Why `option` is not the plan's choice; None for the choice itself."""
    choice = plan.choice
    if option is choice:
        return None
    if option.fits == "no" or choice is None:
        return _too_large(option)
    if option.exchange_s < choice.exchange_s and option.strategy == "pipeline":
        return "hardly faster, and published pipelines are slower than they come out here"
    percent = 100 * (option.exchange_s / choice.exchange_s - 1)
    slower = f"takes {percent:.0f} % longer" if percent >= 1 else "about as fast"
    return f"{slower}: {_largest_difference(option, choice)}"


def _too_large(option: Option) -> str:
    worst = max(option.memory, key=lambda each: each.needed_bytes - each.raised_gpu_bytes)
    needed, has = worst.needed_bytes / GB, worst.raised_gpu_bytes / GB
    return f"{worst.host} would need {needed:.1f} GB, its GPU may wire {has:.1f} at most"


def _largest_difference(option: Option, choice: Option) -> str:
    """What of a token, or of the prompt, costs most beside the choice."""
    decode = _differences(option.decode, choice.decode)
    name = max(decode, key=lambda part: decode[part])
    prompt_s = option.prefill.total_s - choice.prefill.total_s
    if decode[name] <= 0 or prompt_s > option.exchange_s - choice.exchange_s - prompt_s:
        return f"its prefill is slower ({option.prefill_tok_per_s:.0f} tok/s)"
    return f"a token {WORDS[name].format(f'{decode[name] * 1e3:.1f} ms')}"


def _differences(mine: TimeBreakdown, other: TimeBreakdown) -> dict[str, float]:
    return {part: getattr(mine, part) - getattr(other, part) for part in WORDS}

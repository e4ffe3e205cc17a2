"""Bars of plain characters for the report of a plan: the parts of a token's time, and the memory of a host."""

from __future__ import annotations

from collections.abc import Iterator

from kimi_mlx.planner.memory import HostMemory
from kimi_mlx.planner.speed import TimeBreakdown
from kimi_mlx.units import format_gib

BAR = 40
"""Width of the longest bar in characters: lines fit in 80 columns."""

TIME_PARTS = {
    "read_s": "weights",
    "compute_s": "attention",
    "kernels_s": "kernels",
    "fences_s": "fences",
    "link_s": "link",
    "draft_s": "draft model",
    "ssd_s": "SSD",
    "syncs_s": "router",
}
"""Part of a step's time -> its name."""


def legend(has_draft: bool, has_experts: bool = False) -> str:
    """Return the legend of `memory_bar`."""
    experts, draft = "e experts, " if has_experts else "", "d draft model, " if has_draft else ""
    return f"  # weights, {experts}{draft}c cache, p prefill, . free, | GPU limit by default"


def time_bars(step: TimeBreakdown, *, bar_width: int = BAR, has_products: bool = False) -> Iterator[str]:
    """Yield a line for each part of a step's time that is not 0.

    Args:
        step: time of the step.
        bar_width: width of the longest bar in characters.
        has_products: whether the step has several tokens, so that products with the weights count beside attention.
    """
    longest = max(getattr(step, part) for part in TIME_PARTS)
    for part, name in TIME_PARTS.items():
        seconds = getattr(step, part)
        if seconds <= 0:
            continue
        label = "compute" if has_products and part == "compute_s" else name
        yield f"    {label:<12}{'#' * round(bar_width * seconds / longest):<{bar_width}} {seconds * 1e3:6.1f} ms"


def memory_bar(memory: HostMemory, bar_width: int = BAR) -> str:
    """Return the memory of a host as a line, from 0 to what its GPU can use with a raised limit, or to its need."""
    whole = max(memory.needed_bytes, memory.raised_gpu_bytes)
    kept_bytes = (
        min(round(memory.kept_share * memory.experts_bytes), memory.weights_bytes) if memory.kept_share < 1 else 0
    )
    parts = {
        "#": memory.weights_bytes - kept_bytes,
        "e": kept_bytes,
        "d": memory.draft_bytes,
        "c": memory.cache_bytes,
        "p": memory.workspace_bytes,
    }
    bar, total = "", 0
    for character, size in parts.items():
        total += size
        end = round(bar_width * total / whole)
        bar += character * max(end - len(bar), 1 if size else 0)
    bar = bar[:bar_width].ljust(bar_width, ".")
    limit = min(round(bar_width * memory.gpu_bytes / whole), bar_width)
    return f"    [{bar[:limit]}|{bar[limit:]}] of {format_gib(whole)}"

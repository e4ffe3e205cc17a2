#!/usr/bin/env python3
"""Write the table of docs/streaming.md from the planner; a test compares.

scripts/make_streaming_docs.py            write docs/streaming.md
"""

from __future__ import annotations

import re
from pathlib import Path

from kimi_mlx.planner.links import RDMA, TCP, LinkProfile
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.planner.model_shape import known_shape, with_preset
from kimi_mlx.planner.search import make_plan
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS
from kimi_mlx.units import format_duration
from kimi_mlx.weights.presets import PRESETS

PAGE = Path(__file__).parents[1] / "docs" / "streaming.md"
MODEL = "kimi-k2.6"
MACHINES = (
    *("m4-max-64", "m5-max-64", "m3-ultra-96", "m5-ultra-96"),
    *("m4-max-128", "m5-max-128", "m3-ultra-256", "m5-ultra-256"),
)
HEADER = (
    "| Macs | experts | in memory | hits | tok/s | limit raised | equal popularity | prefill | first token of 8k | "
    "command |\n"
    "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --- |"
)


def row(machines: str, preset: str | None) -> str:
    """Return a row of the table: what `kimi-mlx plan` predicts."""
    shape = known_shape(MODEL) if preset is None else with_preset(known_shape(MODEL), PRESETS[preset])
    parsed = parse_machines(machines)
    links: list[LinkProfile] = [RDMA, TCP] if all(machine.chip.has_rdma for machine in parsed) else [TCP]
    choice = make_plan(shape, parsed, links, CONTEXT_TOKENS).choice
    command = f"`kimi-mlx plan {MODEL} --machines {machines}{'' if preset is None else f' --preset {preset}'}`"
    name, experts = machines.replace("x2", " (two)"), preset or "INT4"
    if choice is None:
        return f"| {name} | {experts} | - | - | - | - | - | - | - | {command} |"
    kept, hits, raised, even = "100 %", "100 %", "-", "-"
    if choice.experts is not None:
        shares = (choice.experts.streaming.kept_share, choice.experts.hit_rate)
        kept, hits = (f"{100 * share:.0f} %" for share in shares)
        raised, even = map(_rate, (choice.experts.raised_tok_per_s, choice.experts.uniform_tok_per_s))
    cells = [name, experts, kept, hits, f"{_rate(choice.best_tok_per_s)} (`{choice.strategy}`)", raised, even]
    cells += [f"{choice.prefill_tok_per_s:.0f}", format_duration(choice.first_token_s), command]
    return f"| {' | '.join(cells)} |"


def _rate(tok_per_s: float) -> str:
    return f"{tok_per_s:.1f}" if tok_per_s >= 1 else f"{tok_per_s:.2f}"


def table() -> str:
    """Return the table."""
    rows = [row(machines + count, preset) for machines in MACHINES for count in ("", "x2") for preset in (None, "2bit")]
    return "\n".join([HEADER, *rows])


def page(text: str) -> str:
    """Return the text of the page with the table of today."""
    return re.sub(r"\| Macs \|.*?\n\n", lambda _: f"{table()}\n\n", text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""Bar chart of a benchmark: a panel per rate or time, a group per case, a bar per side. Needs matplotlib, an extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kimi_mlx.bench.report import Report
from kimi_mlx.bench.results import Percentiles, ResultRow, Spread
from kimi_mlx.errors import UsageError
from kimi_mlx.install_command import install_command

Bar = tuple[float, float, float]
"""Height, and lower and upper end of the whisker."""

COLOURS = ("#1f6feb", "#d97706", "#7c8696")
"""Colour of kimi-mlx, then of the others."""


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        UsageError: it is not.
    """
    if find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed", hint=f"run `{install_command('matplotlib')}`"
        )


def save_plot(report: Report, path: Path) -> None:
    """Draw the report into a PNG file."""
    from matplotlib.figure import Figure

    table_rows = report.rows
    panels: dict[str, Callable[[ResultRow], Bar]] = {
        "prefill, tok/s": lambda row: _spread(row.rates["prefill_tok_per_s"]),
        "decode, tok/s": lambda row: _spread(row.rates["decode_tok_per_s"]),
        "first token, ms": lambda row: _times(row.ttft_s),
        "between tokens, ms": lambda row: _times(row.between_tokens_s),
    }
    if any(row.case.concurrency > 1 for row in table_rows):
        panels["all new tokens over wall time, tok/s"] = lambda row: _spread(row.rates["aggregate_tok_per_s"])
    count = len(dict.fromkeys(row.case for row in table_rows))
    figure = Figure(figsize=(max(6.0, 2.5 + 1.1 * count), 2.3 * len(panels) + 1.2), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, bar_of) in zip(axes, panels.items(), strict=True):
        _draw(axis, title, table_rows, bar_of)
    figure.suptitle("\n".join(report.heading()).replace("; ", "\n"), fontsize=8, x=0.01, ha="left")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    figure.text(0.99, 0.005, "rates: median, whiskers min to max; times: p50, whisker to p99", ha="right", fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def _draw(axis: Any, title: str, table_rows: Sequence[ResultRow], bar_of: Callable[[ResultRow], Bar]) -> None:
    cases = list(dict.fromkeys(row.case for row in table_rows))
    sides = list(dict.fromkeys(row.side for row in table_rows))
    width = 0.8 / len(sides)
    for number, side in enumerate(sides):
        bars = [(cases.index(row.case), bar_of(row)) for row in table_rows if row.side == side]
        positions = [position + (number - (len(sides) - 1) / 2) * width for position, _ in bars]
        heights = [bar[0] for _, bar in bars]
        whiskers = [[bar[0] - bar[1] for _, bar in bars], [bar[2] - bar[0] for _, bar in bars]]
        colour = COLOURS[min(number, len(COLOURS) - 1)]
        axis.bar(positions, heights, width * 0.92, label=side, color=colour)
        axis.errorbar(positions, heights, whiskers, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xticks(range(len(cases)), [str(case).replace(" after ", "\nafter ").replace(", ", "\n") for case in cases])
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(bottom=0)


def _spread(spread: Spread) -> Bar:
    return spread.median, spread.min, spread.max


def _times(times: Percentiles) -> Bar:
    return times.p50 * 1000, times.p50 * 1000, times.p99 * 1000

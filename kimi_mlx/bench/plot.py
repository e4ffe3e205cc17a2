"""Plot of a benchmark: decode over depth, and first token over prompt length. Needs matplotlib, an extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kimi_mlx.bench.machine import OURS
from kimi_mlx.bench.measure import Case
from kimi_mlx.bench.report import Report
from kimi_mlx.bench.results import ResultRow
from kimi_mlx.errors import UsageError
from kimi_mlx.install_command import install_command
from kimi_mlx.units import format_count

COLOURS = ("#1f6feb", "#d97706", "#1a7f37", "#cf222e", "#8250df", "#0e8a8a", "#bf3989", "#57606a")
"""Colour of a line; lines of several sides in the same case have the same one."""

STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), ((0, (5, 1)), "D"))
"""Line style and marker of kimi-mlx, then of other sides."""

LOG_FROM = 8
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

LABEL_HEIGHT, LABEL_WIDTH = 8, 26
"""Size in points of a written value."""

LABEL_GAP = 4
"""Distance in points from a point to its value."""

DOTTED = ":"
"""Line style of predictions."""


@dataclass
class Line:
    """A line of a panel.

    Args:
        label: text in the legend.
        colour: its colour.
        style: its line style.
        marker: marker of its points.
        points: x, y, and the lower and upper end of the whisker.
    """

    label: str
    colour: str
    style: Any
    marker: str = "."
    points: list[tuple[float, float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """A diagram.

    Args:
        title: its title, with the unit of y.
        x_name: name of x.
        x_of: x of a case.
        point_of: y of a row, and the ends of its whisker.
        group_of: text in the legend for a case; cases with equal texts share a line.
        predicted: y of a prediction.
    """

    title: str
    x_name: str
    x_of: Callable[[Case], float]
    point_of: Callable[[ResultRow], tuple[float, float, float]]
    group_of: Callable[[Case], str]
    predicted: Callable[[Any], float] | None = None


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
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = panels_of(report)
    all_lines = [make_lines(report, panel) for panel in panels]
    entries = max((len(lines) for lines in all_lines), default=0)
    height = max(4.2, 2.6 + 0.2 * entries)
    figure = Figure(figsize=(10.5, height * len(panels) + 0.8), layout=ConstrainedLayoutEngine(h_pad=0.1))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, panel, lines in zip(axes, panels, all_lines, strict=True):
        _draw(axis, panel, lines)
    figure.suptitle("\n".join(report.heading()).replace("; ", "\n"), fontsize=8, x=0.01, ha="left")
    notes = "rates: median, whiskers min to max; times: p50, whisker to p99"
    if any(line.style == DOTTED for lines in all_lines for line in lines):
        notes += "; dotted: predicted"
    figure.supxlabel(notes, fontsize=7, x=0.01, ha="left")
    figure.draw_without_rendering()  # computes the layout, which the positions of the values depend on
    figure.set_layout_engine("none")
    for axis, lines in zip(axes, all_lines, strict=True):
        _write_values(axis, lines)
    figure.savefig(path, dpi=120, format="png", bbox_inches="tight")


def panels_of(report: Report) -> list[Panel]:
    """Return the diagrams: decode, first token, and for several requests at once their total rate."""
    depths = {row.case.depth for row in report.rows}
    panels = [
        Panel(
            "decode of one request over depth, tok/s",
            "tokens before the answer: depth + prompt",
            lambda case: case.depth + case.prompt_tokens,
            lambda row: _spread_of(row, "decode_tok_per_s"),
            _at_once,
            lambda prediction: prediction.decode_tok_per_s,
        ),
        Panel(
            "first token over prompt length, s",
            "prompt, tokens",
            lambda case: case.prompt_tokens,
            lambda row: (row.ttft_s.p50, row.ttft_s.p50, row.ttft_s.p99),
            lambda case: _at_once(case) + (f", depth {case.depth:,}" if len(depths) > 1 else ""),
            lambda prediction: prediction.first_token_s,
        ),
    ]
    if any(row.case.concurrency > 1 for row in report.rows):
        panels.append(
            Panel(
                "all new tokens over wall time, tok/s",
                "requests at once",
                lambda case: case.concurrency,
                lambda row: _spread_of(row, "aggregate_tok_per_s"),
                lambda case: str(replace(case, concurrency=1)),
            )
        )
    return panels


def _at_once(case: Case) -> str:
    images = f", {format_count(case.images, 'image')}" if case.images else ""
    return f"{case.concurrency} at once{images}"


def _spread_of(row: ResultRow, rate: str) -> tuple[float, float, float]:
    spread = row.rates[rate]
    return spread.median, spread.min, spread.max


def make_lines(report: Report, panel: Panel) -> list[Line]:
    """Return the lines of a panel: one for each side and group, and a dotted one for each predicted group."""
    rows = report.rows
    sides = sorted(dict.fromkeys(row.side for row in rows), key=lambda side: side != OURS)
    groups = list(dict.fromkeys(panel.group_of(row.case) for row in rows))
    lines: dict[tuple[str, str], Line] = {}
    for row in rows:
        group, number = panel.group_of(row.case), sides.index(row.side)
        colour = COLOURS[(groups.index(group) if len(groups) > 1 else number) % len(COLOURS)]
        label = f"{row.side}, {group}" if len(sides) > 1 else group
        line = lines.setdefault((row.side, group), Line(label, colour, *STYLES[min(number, len(STYLES) - 1)]))
        line.points.append((panel.x_of(row.case), *panel.point_of(row)))
        prediction = report.predict(row.case) if report.predict and row.side == OURS else None
        if prediction is not None and panel.predicted is not None:
            dotted = lines.setdefault(("", group), Line(f"predicted, {group}", colour, DOTTED))
            y = panel.predicted(prediction)
            dotted.points.append((panel.x_of(row.case), y, y, y))
    for line in lines.values():
        line.points.sort()
    return list(lines.values())


def is_logarithmic(values: Sequence[float]) -> bool:
    """Return whether an axis with these values is logarithmic: all above 0, the largest LOG_FROM times the smallest."""
    return len(values) > 0 and min(values) > 0 and max(values) >= LOG_FROM * min(values)


def _draw(axis: Any, panel: Panel, lines: Sequence[Line]) -> None:
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.set_xlabel(panel.x_name, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    points = [point for line in lines for point in line.points]
    if not points:
        axis.text(0.5, 0.5, "nothing was measured", transform=axis.transAxes, ha="center", color="#57606a")
        axis.set_xticks([])
        axis.set_yticks([])
        return
    for line in lines:
        xs, ys, lows, highs = zip(*line.points, strict=True)
        if line.style == DOTTED:
            marker = "o" if len(xs) == 1 else None  # hollow: a single point is no line
            axis.plot(
                xs,
                ys,
                label=line.label,
                color=line.colour,
                linestyle=DOTTED,
                marker=marker,
                markerfacecolor="white",
                linewidth=1.6,
            )
            continue
        below = [y - low for y, low in zip(ys, lows, strict=True)]
        above = [high - y for y, high in zip(ys, highs, strict=True)]
        axis.errorbar(
            xs,
            ys,
            [below, above],
            label=line.label,
            color=line.colour,
            linestyle=line.style,
            marker=line.marker,
            markersize=4,
            linewidth=1.6,
            elinewidth=0.9,
            capsize=2,
        )
    _scale(axis.set_xscale, axis.xaxis, sorted({point[0] for point in points}))
    if is_logarithmic([end for point in points for end in point[1:3]]):
        _scale(axis.set_yscale, axis.yaxis, [])
        axis.margins(y=0.12)
    else:
        highest = max(point[3] for point in points)
        axis.set_ylim(0, 1.15 * highest if highest > 0 else 1)
    axis.margins(x=0.08)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def _scale(set_scale: Callable[..., None], ticks: Any, values: Sequence[float]) -> None:
    """Make an axis logarithmic if its values need it, with plain numbers.

    Args:
        set_scale: method of the diagram that sets the scale.
        ticks: the axis.
        values: values at which it gets ticks; empty for a logarithmic axis with its usual ticks.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    if not values or is_logarithmic(values):
        set_scale("log")
    ticks.set_major_formatter(FuncFormatter(lambda value, position: f"{value:,g}"))
    ticks.set_minor_formatter(NullFormatter())
    if values:
        ticks.set_major_locator(FixedLocator(_spaced(values)))
        ticks.set_minor_locator(NullLocator())


def _spaced(values: Sequence[float]) -> list[float]:
    """Return the values without those whose number would overlap the previous one."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= 1.3 * kept[-1]:
            kept.append(value)
    return kept


def _write_values(axis: Any, lines: Sequence[Line]) -> None:
    """Write each measured value right above its point, and above values that are already written there."""
    from matplotlib.patheffects import withStroke

    scale = 72 / axis.figure.dpi
    points = [(point[0], point[1], line) for line in lines if line.style != DOTTED for point in line.points]
    places = [axis.transData.transform((x, y)) * scale for x, y, _ in points]
    taken: list[tuple[float, float]] = []
    for index in sorted(range(len(points)), key=lambda index: (places[index][1], places[index][0])):
        (left, bottom), (x, y, line) = places[index], points[index]
        height = bottom + LABEL_GAP
        while any(abs(left - other) < LABEL_WIDTH and abs(height - used) < LABEL_HEIGHT for other, used in taken):
            height += 1
        taken.append((left, height))
        axis.annotate(
            format_value(y),
            (x, y),
            xytext=(LABEL_GAP, height - bottom),
            textcoords="offset points",
            va="center",
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=5,
            fontsize=7,
            color=line.colour,
            annotation_clip=False,
        )


def format_value(value: float) -> str:
    """Format a value with three digits, such as `0.0123`, `4.56` or `789`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

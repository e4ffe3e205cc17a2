"""Report of a benchmark for people and programs: tables, Markdown, summary, JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rich.table import Table

from kimi_mlx.bench.machine import OURS, PACKAGES
from kimi_mlx.bench.measure import BenchmarkPlan, Case, Run
from kimi_mlx.bench.prediction import Predict
from kimi_mlx.bench.results import (
    ExpertFigures,
    Percentiles,
    ResultRow,
    ShareOf,
    SpeedRatio,
    Spread,
    agreements,
    notes,
    ratios,
    rows,
)
from kimi_mlx.bench.sides import Side
from kimi_mlx.bench.towers import TowerRow, ratio_lines
from kimi_mlx.units import format_bytes, format_count, format_gib

Row = TypeVar("Row")

BUSY_LOAD = 0.5
"""Load average per processor before the start from which a machine counts as busy."""

FIGURE_NAMES = {
    "prefill_tok_per_s": "prefill",
    "decode_tok_per_s": "decode",
    "aggregate_tok_per_s": "new tokens over wall time",
}
"""Rate -> its name in the summary."""


def _is_plain(case: Case) -> bool:
    """Return whether a case is what a calibration predicts: one request with an empty cache, without images."""
    return case.depth == 0 and case.concurrency == 1 and case.images == 0


@dataclass(frozen=True)
class Report:
    """All results.

    Args:
        plan: the plan.
        settings: model, machine, versions and so on, for the top level of the JSON.
        runs: all runs, or those before an interrupt.
        sides: the sides.
        share_of: share of the roofline.
        towers: times of the vision tower alone, of kimi-mlx and of mlx-vlm.
        predict: the planner's prediction; None where it has none.
    """

    plan: BenchmarkPlan
    settings: dict[str, Any]
    runs: Sequence[Run]
    sides: Sequence[Side]
    share_of: ShareOf | None = None
    towers: Sequence[TowerRow] = ()
    predict: Predict | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all runs of the plan were made."""
        return len(self.runs) == self.plan.total * len(self.sides)

    @property
    def rows(self) -> list[ResultRow]:
        """Statistics of each case and side."""
        return rows(self.runs, self.share_of)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        table_rows = self.rows
        return {
            **self.settings,
            "plan": asdict(self.plan),
            "is_complete": self.is_complete,
            "towers": [row.to_dict() for row in self.towers],
            "results": [row.to_dict() for row in table_rows],
            "ratios": [ratio.to_dict() for ratio in ratios(self.runs)],
            "same_tokens": [asdict(agreement) for agreement in agreements(self.runs)],
            "notes": notes(self.runs, self.sides),
            "runs": [run.to_dict() for run in self.runs],
        }

    def heading(self) -> list[str]:
        """Return the workload, the machine and the versions."""
        settings, plan = self.settings, self.plan
        host, packages = settings["machine"], settings["versions"]
        names = ", ".join(f"{name} {packages[name]}" for name in (OURS, *PACKAGES))
        ranks = format_count(settings["ranks"], "rank")
        if hosts := settings.get("hosts"):
            ranks += f" on {', '.join(hosts)}"
        workload = f"{plan.generation_tokens} new tokens"
        if plan.has_images:
            workload += f", images of {plan.image_size[0]}x{plan.image_size[1]} ({plan.image_tokens} tokens)"
        if (delay := settings.get("link_delay_ms")) is not None:
            ranks += f" {delay:g} ms apart each way"
        return [
            f"{settings['model']}, {settings['dtype']}, {ranks}, {workload}; "
            f"median (min-max) of {plan.repeat} after {plan.warmup} warm-up",
            f"{host['device']}, {host['processors']} processors, {format_gib(host['memory_bytes'])}, "
            f"load {host['load_average_1min']}; {names}",
        ]

    def summary(self) -> list[str]:
        """Return ratios of a single case, agreement of tokens, notes, and the roofline."""
        lines = [*([] if self._ratio_rows else _ratio_lines(ratios(self.runs))), *ratio_lines(self.towers)]
        for agreement in agreements(self.runs):
            if agreement.first_difference is None:
                lines.append(f"{agreement.side}: same tokens as kimi-mlx in all {agreement.answers} answers")
            else:
                lines.append(
                    f"{agreement.side}: same tokens as kimi-mlx in {agreement.equal} of {agreement.answers} "
                    f"answers; earliest difference at token {agreement.first_difference}"
                )
        lines += [*self._expert_lines(), *self._prediction_lines()]
        lines += notes(self.runs, self.sides)
        if roofline := self.settings.get("roofline"):
            lines.append(f"roofline: {roofline['bytes_per_s'] / 1e9:.1f} GB/s ({roofline['source']})")
        host = self.settings["machine"]
        if (load := host["load_average_1min"]) > BUSY_LOAD * host["processors"]:
            lines.append(
                f"busy: load {load:g} before the start, on {host['processors']} processors: other programs made this "
                "slower; repeat it on a quiet machine"
            )
        if not self.is_complete:
            lines.append(f"interrupted after {len(self.runs)} of {self.plan.total * len(self.sides)} runs")
        return lines

    def _expert_lines(self) -> list[str]:
        """Return a line for each row whose experts were read from the SSD."""
        return [
            f"{row.case}: {_describe_experts(row.experts)} (`{row.side}`)"
            for row in self.rows
            if row.experts is not None
        ]

    def _prediction_lines(self) -> list[str]:
        """Return the predicted speeds of kimi-mlx and their ratios to the measured ones: empty cache, one request."""
        seen = {row.case.prompt_tokens: row.rates for row in self.rows if row.side == OURS and _is_plain(row.case)}
        lines: list[str] = []
        for prediction in self.settings.get("predictions", ()):
            if (rates := seen.get(prediction["prompt_tokens"])) is None:
                continue
            figures = [
                f"{name.removesuffix('_tok_per_s')} {prediction[name]:.3g} tok/s "
                f"({prediction[name] / rates[name].median:.2f} times the measured speed)"
                for name in ("prefill_tok_per_s", "decode_tok_per_s")
                if name in rates
            ]
            lines.append(
                f"predicted for {prediction['strategy']}, prompt {prediction['prompt_tokens']}: {', '.join(figures)}"
            )
        return lines

    def tables(self) -> list[Table]:
        """Return a table of speeds, one of times, and those of ratios and of the towers if there are any."""
        speeds = [column for column in self._columns() if " ms" not in column[0]]
        times = [column for column in self._columns() if " tok/s" not in column[0] and column[0] not in RESOURCES]
        tables = [_table(columns, self.rows) for columns in (speeds, times)]
        if self._ratio_rows:
            tables.append(_table(self._ratio_columns(), self._ratio_rows))
        return [*tables, _table(TOWER_COLUMNS, self.towers)] if self.towers else tables

    def markdown(self) -> str:
        """Return the report as Markdown: heading, tables, summary."""
        table = markdown_table(self._columns(), self.rows, "side")
        ratio_table = markdown_table(self._ratio_columns(), self._ratio_rows, "against") if self._ratio_rows else ""
        towers = markdown_table(TOWER_COLUMNS, self.towers, "tower") if self.towers else ""
        bullets = "\n".join(f"- {line}" for line in self.summary())
        return (
            "\n\n".join(part for part in ("\n".join(self.heading()), table, ratio_table, towers, bullets) if part)
            + "\n"
        )

    @property
    def _ratio_rows(self) -> list[RatioRow]:
        """Ratios of each case; empty for a single case, whose ratios are in the summary."""
        by_case: dict[Case, dict[str, SpeedRatio]] = {}
        for ratio in ratios(self.runs):
            by_case.setdefault(ratio.case, {})[ratio.figure] = ratio
        return [RatioRow(case, figures) for case, figures in by_case.items()] if len(by_case) > 1 else []

    def _ratio_columns(self) -> list[tuple[str, Callable[[RatioRow], str]]]:
        """Return the columns that are not empty in these rows."""
        has_depth = any(row.case.depth for row in self._ratio_rows)
        return [column for column in RATIO_COLUMNS if column[0] != "depth" or has_depth]

    def _columns(self) -> list[Column]:
        """Return the columns that are not empty in these rows."""
        table_rows = self.rows
        is_shown = {
            **dict.fromkeys(IMAGE_COLUMNS, any(row.encoding for row in table_rows)),
            "depth": any(row.case.depth for row in table_rows),
            "at once": any(row.case.concurrency > 1 for row in table_rows),
            "together tok/s": any(row.case.concurrency > 1 for row in table_rows),
            "J/token": any(row.joules_per_token is not None for row in table_rows),
            "roofline": any(row.roofline_share is not None for row in table_rows),
        }
        return [column for column in COLUMNS if is_shown.get(column[0], True)]


Column = tuple[str, Callable[[ResultRow], str]]
"""Heading, and function that formats a cell."""

RESOURCES = ("peak memory per rank", "J/token", "roofline", "encode s", "prefill s")
"""Columns that are not in the table of times."""

IMAGE_COLUMNS = ("images", "encode s", "encode tok/s", "prefill s")

COLUMNS: Sequence[Column] = (
    ("prompt", lambda row: str(row.case.prompt_tokens)),
    ("images", lambda row: str(row.case.images)),
    ("depth", lambda row: str(row.case.depth)),
    ("at once", lambda row: str(row.case.concurrency)),
    ("side", lambda row: row.side),
    ("encode s", lambda row: "" if row.encoding is None else _seconds(row.encoding.encode_s)),
    ("encode tok/s", lambda row: "" if row.encoding is None else _rate(row.encoding.encode_tok_per_s)),
    ("prefill s", lambda row: "" if row.encoding is None else _seconds(row.encoding.prefill_s)),
    ("prefill tok/s", lambda row: _rate(row.rates["prefill_tok_per_s"])),
    ("decode tok/s", lambda row: _rate(row.rates["decode_tok_per_s"])),
    ("together tok/s", lambda row: _rate(row.rates["aggregate_tok_per_s"])),
    ("TTFT ms p50/p90/p99", lambda row: format_milliseconds(row.ttft_s)),
    ("between tokens ms p50/p90/p99", lambda row: format_milliseconds(row.between_tokens_s)),
    ("peak memory per rank", lambda row: " + ".join(map(format_gib, row.peak_memory_bytes))),
    ("J/token", lambda row: "" if row.joules_per_token is None else f"{row.joules_per_token:.2f}"),
    ("roofline", lambda row: "" if row.roofline_share is None else f"{row.roofline_share:.1%}"),
)


@dataclass(frozen=True)
class RatioRow:
    """Speed of kimi-mlx relative to the best other side, in one case.

    Args:
        case: the case.
        figures: ratio of each figure that is compared.
    """

    case: Case
    figures: dict[str, SpeedRatio]

    def cell(self, figure: str) -> str:
        """Format a ratio with its spread; empty if the figure is not compared."""
        return _ratio(self.figures[figure]) if figure in self.figures else ""


RATIO_COLUMNS: Sequence[tuple[str, Callable[[RatioRow], str]]] = (
    ("prompt", lambda row: str(row.case.prompt_tokens)),
    ("depth", lambda row: str(row.case.depth)),
    ("at once", lambda row: str(row.case.concurrency)),
    ("prefill ratio", lambda row: row.cell("prefill_tok_per_s")),
    ("decode ratio", lambda row: row.cell("decode_tok_per_s")),
    ("together ratio", lambda row: row.cell("aggregate_tok_per_s")),
    ("against", lambda row: ", ".join(dict.fromkeys(ratio.against for ratio in row.figures.values()))),
)


TOWER_COLUMNS: Sequence[tuple[str, Callable[[TowerRow], str]]] = (
    ("images", lambda row: str(row.images)),
    ("tokens", lambda row: str(row.image_tokens)),
    ("tower", lambda row: row.side),
    ("s", lambda row: _seconds(row.encode_s)),
    ("tok/s", lambda row: _rate(row.tok_per_s)),
)


def _table(columns: Sequence[tuple[str, Callable[[Row], str]]], table_rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, _ in columns:
        table.add_column(name, justify="left" if name in ("side", "tower", "against") else "right", no_wrap=True)
    for row in table_rows:
        table.add_row(*(cell(row) for _, cell in columns))
    return table


def _ratio_lines(all_ratios: Sequence[SpeedRatio]) -> list[str]:
    """Return a line per case."""
    by_case: dict[Case, list[str]] = {}
    for ratio in all_ratios:
        text = f"{_ratio(ratio)} in {FIGURE_NAMES[ratio.figure]} (`{ratio.against}`)"
        by_case.setdefault(ratio.case, []).append(text)
    others = " or ".join(dict.fromkeys(ratio.against.split()[0] for ratio in all_ratios))
    return [f"{case}: kimi-mlx / {others} = {', '.join(texts)}" for case, texts in by_case.items()]


def _describe_experts(experts: ExpertFigures) -> str:
    """Return the figures of experts that were read from the SSD, for people."""
    guesses = "" if experts.guesses_right is None else f", {experts.guesses_right:.0%} of the guesses right"
    return (
        f"{experts.hit_rate:.0%} of the needed experts in memory, {format_bytes(experts.read_bytes_per_token)} read "
        f"per token, {experts.wait_share:.0%} of the time waiting for reads ({1000 * experts.wait_s_per_token:.1f} ms "
        f"per token){guesses}; {format_bytes(experts.prompt_read_bytes)} read for the prompt"
    )


def _ratio(ratio: SpeedRatio) -> str:
    return f"{ratio.ratio:.2f} ({ratio.spread.min:.2f}-{ratio.spread.max:.2f})"


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.min:.3f}-{spread.max:.3f})"


def _rate(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.min:.1f}-{spread.max:.1f})"


def markdown_table(columns: Sequence[tuple[str, Callable[[Row], str]]], table_rows: Sequence[Row], left: str) -> str:
    """Return a Markdown table.

    Args:
        columns: heading and cell function of each column.
        table_rows: the rows.
        left: heading of the left-aligned column.
    """
    lines = [
        " | ".join(name for name, _ in columns),
        " | ".join("---" if name == left else "--:" for name, _ in columns),
        *(" | ".join(cell(row) for _, cell in columns) for row in table_rows),
    ]
    return "\n".join(f"| {line} |" for line in lines)


def format_milliseconds(times: Percentiles) -> str:
    """Format percentiles, such as `8.1 / 9.0 / 12.4`."""
    return " / ".join(f"{time * 1000:.{1 if time < 0.1 else 0}f}" for time in (times.p50, times.p90, times.p99))

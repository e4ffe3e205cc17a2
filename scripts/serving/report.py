"""Report of the serving benchmark for people and programs: tables, Markdown, summary, JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from kimi_mlx.bench.machine import OURS, PACKAGES
from kimi_mlx.bench.report import format_milliseconds, markdown_table
from kimi_mlx.bench.results import Percentiles, Spread
from kimi_mlx.units import format_bytes
from scripts.serving.load import ServingRun
from scripts.serving.prompts import Workload
from scripts.serving.results import ServingRow, memory_growth_bytes, same_texts, serving_ratios, serving_rows


@dataclass(frozen=True)
class ServingReport:
    """All results.

    Args:
        load: the workload.
        settings: model, machine, versions and so on, for the top level of the JSON.
        runs: all runs.
        healths: final `/health` response of each server, by name.
    """

    load: Workload
    settings: dict[str, Any]
    runs: Sequence[ServingRun]
    healths: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            **self.settings,
            "load": asdict(self.load),
            "results": [row.to_dict() for row in serving_rows(self.runs)],
            "ratios": [ratio.to_dict() for ratio in serving_ratios(self.runs)],
            "same_texts": [asdict(agreement) for agreement in same_texts(self.runs)],
            "health_afterwards": self.healths,
            "runs": [_run_to_dict(run) for run in self.runs],
        }

    def heading(self) -> list[str]:
        """Return the workload, the machine and the versions."""
        load, host, packages = self.load, self.settings["machine"], self.settings["versions"]
        new = "new " * load.has_new_prefix
        shared = f" after {load.shared_tokens} {new}shared tokens" if load.shared_tokens else ""
        prompt = str(load.prompt_tokens)
        if load.turns > 1:
            prompt += f", then {load.later_tokens or load.prompt_tokens}"
        turns = f" of {load.turns} turns" if load.turns > 1 else ""
        return [
            f"{self.settings['model']}: {load.clients} clients, {load.conversations} conversations{turns}, "
            f"{prompt} prompt tokens{shared}, {load.answer_tokens} new tokens" + (", streamed" if load.stream else ""),
            f"{host['device']}, {host['processors']} processors, {format_bytes(host['memory_bytes'])}, load "
            f"{host['load_average_1min']}; " + ", ".join(f"{name} {packages[name]}" for name in (OURS, *PACKAGES)),
        ]

    def table(self) -> Table:
        """Return a table with a column per server."""
        rows = serving_rows(self.runs)
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        for row in rows:
            table.add_column(row.side, justify="right")
        for name, cell in self._columns()[1:]:
            table.add_row(name, *map(cell, rows))
        return table

    def markdown(self) -> str:
        """Return the report as Markdown."""
        table = markdown_table(self._columns(), serving_rows(self.runs), "server")
        return "\n\n".join(("\n".join(self.heading()), table, "\n".join(f"- {line}" for line in self.summary()))) + "\n"

    def summary(self) -> list[str]:
        """Return ratios, agreement of texts, memory growth, badly behaved clients and final health."""
        lines = [
            f"kimi-mlx / {ratio.against} in {_name(ratio.figure)}: {_spread(ratio.ratio, 2)}"
            for ratio in serving_ratios(self.runs)
        ]
        lines += [
            f"{agreement.side}: same text as kimi-mlx in {agreement.equal} of {agreement.answers} first answers"
            for agreement in same_texts(self.runs)
        ]
        for row in serving_rows(self.runs):
            if row.new_tokens != row.requested_tokens:
                lines.append(f"{row.side}: {row.new_tokens} of {row.requested_tokens} requested tokens")
            if (growth := memory_growth_bytes(row)) is not None:
                lines.append(f"{row.side}: memory growth in the second half of the requests {_change(growth)}")
        for run in self.runs:
            if (result := run.bad_client_result) is not None and run.repetition >= 0:
                lines.append(
                    f"{run.side}: meanwhile {result.aborted} streams were aborted and {result.slow_reads} read slowly, "
                    f"{len(result.errors)} errors"
                )
        for side, health in self.healths.items():
            shown = ", ".join(f"{name} {health[name]}" for name in ("status", "running", "waiting") if name in health)
            lines.append(f"{side} afterwards: {shown or 'no answer'}")
        return lines

    def _columns(self) -> list[Column]:
        turns: list[Column] = [
            (f"TTFT{f' of turn {turn + 1}' if self.load.turns > 1 else ''} ms p50/p90/p99", _ttft_of(turn))
            for turn in range(self.load.turns)
        ]
        return [*COLUMNS[:5], *turns, *COLUMNS[5:]]


Column = tuple[str, Callable[[ServingRow], str]]
"""Heading, and function that formats a cell."""

COLUMNS: Sequence[Column] = (
    ("server", lambda row: row.side),
    ("requests", lambda row: str(row.requests)),
    ("errors", lambda row: ", ".join(f"{count} {kind}" for kind, count in row.errors.items()) or "0"),
    ("requests/s", lambda row: _spread(row.requests_per_s, 2)),
    ("new tok/s", lambda row: _spread(row.tok_per_s, 1)),
    ("between chunks ms p50/p90/p99", lambda row: _milliseconds(row.inter_token_s)),
    ("prompt cached", lambda row: f"{row.cached_tokens / max(row.prompt_tokens, 1):.0%}"),
    ("memory first, last", lambda row: _memory(row.resident_bytes)),
)


def _ttft_of(turn: int) -> Callable[[ServingRow], str]:
    return lambda row: _milliseconds(row.ttft_s[turn] if turn < len(row.ttft_s) else None)


def _name(figure: str) -> str:
    return figure.replace("tok_per_s", "new tok/s").replace(" ttft_s", " of TTFT,")


def _spread(spread: Spread, digits: int) -> str:
    if spread.min == spread.max:
        return f"{spread.median:.{digits}f}"
    return f"{spread.median:.{digits}f} ({spread.min:.{digits}f}-{spread.max:.{digits}f})"


def _milliseconds(times: Percentiles | None) -> str:
    return "" if times is None else format_milliseconds(times)


def _memory(resident: Sequence[int]) -> str:
    return f"{format_bytes(resident[0])}, {format_bytes(resident[-1])}" if resident else ""


def _change(growth: int) -> str:
    return f"{'+' if growth >= 0 else '-'}{format_bytes(abs(growth))}"


def _run_to_dict(run: ServingRun) -> dict[str, Any]:
    """Return a run for JSON, without texts."""
    values = asdict(run)
    first = min((record.started_at for record in run.records), default=0.0)
    values["records"] = [
        {
            "conversation": record.conversation,
            "turn": record.turn,
            "started_s": record.started_at - first,
            "arrivals_s": [at - first for at in record.arrivals],
            "ended_s": record.ended_at - first,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "new_tokens": record.new_tokens,
            "error": record.error,
        }
        for record in run.records
    ]
    return values

"""From runs to figures: medians, spread, ratios, whether the texts agree; as a table and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

import mlx.core as mx
from rich.table import Table

from kimi_mlx import __version__
from kimi_mlx.bench.measure import Plan, Run
from kimi_mlx.engine.request import Statistics
from kimi_mlx.units import format_bytes, format_seconds

OURS = "kimi-mlx"
PACKAGES = ("mlx", "mlx-lm")

FIGURES: dict[str, Callable[[Statistics], float]] = {
    "prefill_tok_per_s": lambda s: s.prefill_tok_per_s,
    "decode_tok_per_s": lambda s: s.decode_tok_per_s,
    "ttft_s": lambda s: s.ttft_s,
    "peak_memory_bytes": lambda s: s.peak_memory_bytes,
}
RATES = ("prefill_tok_per_s", "decode_tok_per_s")


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a figure."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """The figures of one side for one prompt size; `figures` has the keys of FIGURES."""

    side: str
    prompt_tokens: int
    generation_tokens: int
    figures: dict[str, Spread]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        spreads = {name: asdict(spread) for name, spread in self.figures.items()}
        return {"side": self.side, "prompt_tokens": self.prompt_tokens} | {
            "generation_tokens": self.generation_tokens,
            **spreads,
        }


@dataclass(frozen=True)
class Ratio:
    """kimi-mlx against the best other side: quotients of medians of tok/s, above 1 where kimi-mlx is faster.

    Args:
        prompt_tokens: for this prompt size.
        prefill: ratio of prefill_tok_per_s.
        prefill_against: the side that was the best there.
        decode: ratio of decode_tok_per_s.
        decode_against: the side that was the best there.
    """

    prompt_tokens: int
    prefill: float
    prefill_against: str
    decode: float
    decode_against: str


@dataclass(frozen=True)
class Agreement:
    """Whether another side generated the same tokens as kimi-mlx.

    Args:
        side: the other side.
        answers: how many were compared, warm-ups included.
        equal: how many were equal in every token.
        first_difference: the smallest position of a differing token, None if there is none.
    """

    side: str
    answers: int
    equal: int
    first_difference: int | None


def rows(runs: Sequence[Run]) -> list[Row]:
    """The figures of each prompt size and side, in the order in which they were first run."""
    counted: dict[tuple[int, str], list[Statistics]] = {}
    for run in runs:
        if not run.is_warmup:
            counted.setdefault((run.statistics.prompt_tokens, run.side), []).append(run.statistics)
    order = {name: index for index, name in enumerate(dict.fromkeys([OURS, *(run.side for run in runs)]))}
    return [
        Row(
            side,
            length,
            group[0].generated_tokens,
            {name: Spread.of([figure(each) for each in group]) for name, figure in FIGURES.items()},
        )
        for (length, side), group in sorted(counted.items(), key=lambda item: (item[0][0], order[item[0][1]]))
    ]


def ratios(table_rows: Sequence[Row]) -> list[Ratio]:
    """kimi-mlx against the best of the others, for each prompt size; empty without others."""
    found: list[Ratio] = []
    for ours in (row for row in table_rows if row.side == OURS):
        others = [row for row in table_rows if row.side != OURS and row.prompt_tokens == ours.prompt_tokens]
        if others:
            best = {name: max(others, key=lambda row, n=name: row.figures[n].median) for name in RATES}
            prefill, decode = (
                ours.figures[name].median / best[name].figures[name].median
                if best[name].figures[name].median
                else float("nan")
                for name in RATES
            )
            sides = [best[name].side for name in RATES]
            found.append(Ratio(ours.prompt_tokens, prefill, sides[0], decode, sides[1]))
    return found


def agreements(runs: Sequence[Run]) -> list[Agreement]:
    """Compare the tokens of every other side with those of kimi-mlx, answer by answer."""
    keys = [(run.statistics.prompt_tokens, run.repetition) for run in runs]
    ours = {key: run.ids for key, run in zip(keys, runs, strict=True) if run.side == OURS}
    found: list[Agreement] = []
    for side in dict.fromkeys(run.side for run in runs if run.side != OURS):
        pairs = [(ours[key], run.ids) for key, run in zip(keys, runs, strict=True) if run.side == side]
        positions = [position for pair in pairs if (position := _first_difference(*pair)) is not None]
        found.append(Agreement(side, len(pairs), len(pairs) - len(positions), min(positions, default=None)))
    return found


def _first_difference(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    if one == other:
        return None
    shared = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(shared) if a != b), min(len(one), len(other)))


def machine() -> dict[str, Any]:
    """The machine and what it does besides: a load average near 0 before the start is a quiet machine."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "device": mx.device_info().get("device_name", platform.processor()),
        "backend": str(mx.default_device().type).removeprefix("DeviceType."),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    return {
        "python": platform.python_version(),
        OURS: __version__,
        **{name: version(name) for name in PACKAGES},
    }


def to_dict(runs: Sequence[Run], plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """The whole report for JSON; `settings` says what was measured and where."""
    table_rows = rows(runs)
    return {
        **settings,
        "plan": asdict(plan),
        "results": [row.to_dict() for row in table_rows],
        "ratios": [asdict(ratio) for ratio in ratios(table_rows)],
        "same_tokens": [asdict(agreement) for agreement in agreements(runs)],
        "runs": [run.to_dict() for run in runs],
    }


def heading(settings: dict[str, Any], plan: Plan) -> str:
    """What was measured, where, and with which versions, in two lines."""
    host, packages = settings["machine"], settings["versions"]
    names = ", ".join(f"{name} {packages[name]}" for name in (OURS, *PACKAGES))
    ranks = f"{settings['ranks']} rank{'s' if settings['ranks'] > 1 else ''}"
    if hosts := settings.get("hosts"):
        ranks += f" on {', '.join(hosts)}"
    return (
        f"{settings['model']}, {settings['dtype']}, {ranks}, {plan.generation_tokens} new tokens; "
        f"median (min-max) of {plan.repeat} after {plan.warmup} warm-up\n"
        f"{host['device']}, {host['processors']} processors, {format_bytes(host['memory_bytes'])}; {names}"
    )


def result_table(table_rows: Sequence[Row]) -> Table:
    """Medians, the smallest and largest value in parentheses."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("prompt", justify="right", no_wrap=True)
    table.add_column("side", no_wrap=True)
    for name in ("prefill tok/s", "decode tok/s", "TTFT", "peak memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in table_rows:
        figures = row.figures
        table.add_row(
            str(row.prompt_tokens),
            row.side,
            _rate(figures["prefill_tok_per_s"]),
            _rate(figures["decode_tok_per_s"]),
            format_seconds(figures["ttft_s"].median),
            format_bytes(figures["peak_memory_bytes"].median),
        )
    return table


def summary_lines(runs: Sequence[Run]) -> list[str]:
    """The ratios, and whether the tokens are the same; nothing if there is one side only."""
    lines = [
        f"prompt {ratio.prompt_tokens}: kimi-mlx / mlx-lm = {ratio.prefill:.2f} in prefill "
        f"(`{ratio.prefill_against}`), {ratio.decode:.2f} in decode (`{ratio.decode_against}`)"
        for ratio in ratios(rows(runs))
    ]
    for agreement in agreements(runs):
        if agreement.first_difference is None:
            lines.append(f"{agreement.side}: the same tokens as kimi-mlx in all {agreement.answers} answers")
        else:
            lines.append(
                f"{agreement.side}: the same tokens as kimi-mlx in {agreement.equal} of {agreement.answers} "
                f"answers; they part at token {agreement.first_difference} at the earliest"
            )
    return lines


def _rate(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.min:.1f}-{spread.max:.1f})"

"""Report of the loading benchmark: medians, and ratios to mlx-lm, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from kimi_mlx.bench.machine import OURS, machine, versions
from kimi_mlx.bench.results import Spread
from kimi_mlx.units import format_bytes
from scripts.loading.files import LoadingFiles
from scripts.loading.measure import Load, LoadingRun

FIGURES = ("needed_bytes", "read_bytes", "disk_bytes", "seconds", "held_bytes", "peak_bytes", "mlx_peak_bytes")
"""Fields of scripts.loading.measure.Load; the value of a run is that of the rank with the largest."""

COMPARED = ("needed_bytes", "seconds", "peak_bytes", "mlx_peak_bytes")

METHOD = {
    "needed_bytes": "the larger of read_bytes and disk_bytes",
    "read_bytes": "rchar of /proc/self/io: read by calls, from the page cache or the disk; no memory maps",
    "disk_bytes": "read_bytes of /proc/self/io: from the disk, read-ahead and memory maps included",
    "seconds": "from the load command, with all ranks connected, until every parameter is in memory",
    "held_bytes": "size of all parameters",
    "peak_bytes": "peak RSS minus RSS before, memory maps included; Linux VmHWM, macOS ru_maxrss",
    "mlx_peak_bytes": "mx.get_peak_memory minus mx.get_active_memory before",
    "total_s": "from the start of the processes until all ranks have loaded, without dropping caches",
}


@dataclass(frozen=True)
class LoadingRow:
    """Measurements of a side over its runs.

    Args:
        side: name of the side.
        figures: spreads by the names in FIGURES, and `total_s`; without those that the system does not report.
    """

    side: str
    figures: dict[str, Spread]

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {"side": self.side, **{name: asdict(spread) for name, spread in self.figures.items()}}


@dataclass(frozen=True)
class LoadingRatio:
    """kimi-mlx's store relative to one side of mlx-lm in the same dtype: quotients of medians, lower is better.

    Args:
        against: name of the other side.
        figures: quotients by the names in COMPARED.
    """

    against: str
    figures: dict[str, float]


def loading_rows(runs: Sequence[LoadingRun]) -> list[LoadingRow]:
    """Return a row for each side, in the order of the first run."""
    return [_row(side, [run for run in runs if run.side == side]) for side in dict.fromkeys(run.side for run in runs)]


def _row(side: str, runs: Sequence[LoadingRun]) -> LoadingRow:
    figures = {"total_s": Spread.of([run.total_s for run in runs])}
    for name in FIGURES:
        values = [_largest(run.loads, name) for run in runs]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            figures[name] = Spread.of(known)
    return LoadingRow(side, figures)


def _largest(loads: Sequence[Load], name: str) -> float | None:
    values = [getattr(load, name) for load in loads]
    return None if None in values else max(values)


def loading_ratios(rows: Sequence[LoadingRow]) -> list[LoadingRatio]:
    """Compare kimi-mlx's first side (the store, in the checkpoint's own dtype) with each side of mlx-lm."""
    ours = rows[0].figures
    return [
        LoadingRatio(
            row.side,
            {
                name: ours[name].median / row.figures[name].median
                for name in COMPARED
                if name in ours and name in row.figures
            },
        )
        for row in rows
        if not row.side.startswith(OURS)
    ]


def loading_settings(files: LoadingFiles, stored_dtype: str) -> dict[str, Any]:
    """Return the files and the machine. Call it before the measurement, because it includes the load average."""
    return {
        "checkpoint_bytes": files.checkpoint_bytes,
        "expert_bytes": files.expert_bytes,
        "store_bytes": list(files.store_bytes),
        "dtype": stored_dtype,
        "ranks": len(files.copies),
        "machine": machine(),
        "versions": versions(),
    }


def loading_to_dict(runs: Sequence[LoadingRun], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the whole report for JSON."""
    rows = loading_rows(runs)
    return {
        **settings,
        "caches": sorted({run.caches for run in runs}),
        "method": METHOD,
        "results": [row.to_dict() for row in rows],
        "ratios": [asdict(ratio) for ratio in loading_ratios(rows)],
        "runs": [asdict(run) for run in runs],
    }


def loading_heading(runs: Sequence[LoadingRun], settings: dict[str, Any]) -> str:
    """Return the files, the method and the machine in three lines."""
    host, size = settings["machine"], settings["checkpoint_bytes"]
    stores = ", ".join(format_bytes(store) for store in settings["store_bytes"])
    packages = ", ".join(f"{name} {version}" for name, version in settings["versions"].items() if name != "python")
    repetitions = 1 + max(run.repetition for run in runs)
    return (
        f"checkpoint {format_bytes(size)}, {settings['expert_bytes'] / size:.0%} of it experts; stores {stores}\n"
        f"{settings['ranks']} ranks, {settings['dtype']}; median (min-max) of {repetitions}, largest rank of each; "
        f"{' / '.join(sorted({run.caches for run in runs}))}\n"
        f"{host['device']}, {host['processors']} processors, load {host['load_average_1min']}; {packages}"
    )


def loading_table(rows: Sequence[LoadingRow]) -> Table:
    """Return a table of medians; seconds also with minimum and maximum."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("side", no_wrap=True)
    for name in ("read MB", "seconds", "with start", "share MB", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        seconds = row.figures["seconds"]
        table.add_row(
            row.side,
            _megabytes(row, "needed_bytes"),
            f"{seconds.median:.2f} ({seconds.min:.2f}-{seconds.max:.2f})",
            f"{row.figures['total_s'].median:.2f}",
            _megabytes(row, "held_bytes"),
            _megabytes(row, "peak_bytes"),
        )
    return table


def _megabytes(row: LoadingRow, name: str) -> str:
    return f"{row.figures[name].median / 1e6:.0f}" if name in row.figures else "-"


def loading_lines(rows: Sequence[LoadingRow]) -> list[str]:
    """Return the ratios to each side of mlx-lm, then to the best of them in each measurement."""
    ours, ratios = rows[0].side, loading_ratios(rows)
    lines = [f"{ours} / {ratio.against}: {_format_ratios(ratio.figures)}" for ratio in ratios]
    if len(ratios) > 1:
        best = {
            name: max(ratio.figures[name] for ratio in ratios)
            for name in COMPARED
            if all(name in ratio.figures for ratio in ratios)
        }
        lines.append(f"{ours} / best of mlx-lm in each: {_format_ratios(best)}")
    return lines


def _format_ratios(figures: dict[str, float]) -> str:
    titles = {"needed_bytes": "bytes", "seconds": "time", "peak_bytes": "peak", "mlx_peak_bytes": "MLX's peak"}
    return ", ".join(f"{titles[name]} {ratio:.2f}" for name, ratio in figures.items())

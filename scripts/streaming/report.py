"""Report of the streaming benchmark: a table, and the targets that were met or missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from kimi_mlx.bench.results import Spread
from kimi_mlx.units import MB, format_bytes
from scripts.streaming.files import StreamingFiles
from scripts.streaming.measure import SIDES, Memory, StreamingRun

MAX_PEAK, MIN_AGAINST_MAP, MIN_AGAINST_LRU, MIN_OF_BOUND = 1.1, 1.5, 1.0, 0.8
"""Targets."""


@dataclass(frozen=True)
class StreamingRow:
    """Figures of a side.

    Args:
        side: name of the side.
        tok_per_s: rate of decode.
        cpu_s_per_token: median of the processor time of a token; other load on the machine hardly changes it.
        hit_rate: share of the needed experts that were in memory; None without counters.
        read_bytes_per_token: bytes read from the disk per token, as the system counts them; None if it does not.
        waited: share of the time that steps waited for reads.
        guesses_right: share of the guesses that were right; None without guesses.
        peak_bytes: peak of the resident memory that loading and decoding added to that of the process.
    """

    side: str
    tok_per_s: Spread
    cpu_s_per_token: float
    hit_rate: float | None
    read_bytes_per_token: float | None
    waited: float | None
    guesses_right: float | None
    peak_bytes: int


@dataclass(frozen=True)
class Target:
    """A target.

    Args:
        name: what is compared.
        figures: the figures, for people.
        is_met: whether it is met.
    """

    name: str
    figures: str
    is_met: bool


def streaming_rows(runs: Sequence[StreamingRun]) -> list[StreamingRow]:
    """Return the figures of each side, over all repetitions."""
    return [_row(side, [run for run in runs if run.side == side]) for side in SIDES]


def _row(side: str, runs: Sequence[StreamingRun]) -> StreamingRow:
    num_tokens = sum(len(run.result.seconds) for run in runs)
    disk = [run.result.disk_bytes for run in runs if run.result.disk_bytes is not None]
    counts = [run.result.stats for run in runs if run.result.stats is not None]
    total: Callable[[str], float] = lambda name: sum(count[name] for count in counts)  # noqa: E731
    needed, guesses = (total("hits") + total("misses"), total("guesses")) if counts else (0, 0)
    seconds = sum(sum(run.result.seconds) for run in runs)
    return StreamingRow(
        side,
        Spread.of([run.tok_per_s for run in runs]),
        median([run.result.cpu_seconds / len(run.result.seconds) for run in runs]),
        total("hits") / needed if needed else None,
        sum(disk) / num_tokens if disk else None,
        total("wait_seconds") / seconds if counts else None,
        total("guesses_right") / guesses if guesses else None,
        max(run.result.peak_bytes - run.result.before_bytes for run in runs),
    )


@dataclass(frozen=True)
class Bound:
    """The fastest that a token can be, if reads and computation overlap fully.

    Args:
        disk_bytes_per_s: measured rate of random reads of experts.
        read_s: time to read the missing experts of a token.
        compute_s: time of a token with all experts in memory.
    """

    disk_bytes_per_s: Spread
    read_s: float
    compute_s: float

    @property
    def tok_per_s(self) -> float:
        """The bound."""
        return 1 / max(self.read_s, self.compute_s)

    @classmethod
    def of(cls, runs: Sequence[StreamingRun], rows: Sequence[StreamingRow]) -> Bound:
        """Return the bound for what kimi-mlx has missed."""
        disk = Spread.of([run.result.disk_bytes_per_s for run in runs if run.side == "disk"])
        ours = [run.result for run in runs if run.side == "kimi-mlx"]
        missed = sum(result.stats["misses"] * result.stats["expert_bytes"] for result in ours if result.stats)
        num_tokens = sum(len(result.seconds) for result in ours)
        return cls(disk, missed / num_tokens / disk.median, 1 / _rate(rows, "resident"))


def targets(runs: Sequence[StreamingRun], rows: Sequence[StreamingRow], memory: Memory, bound: Bound) -> list[Target]:
    """Return the targets with their figures."""
    ours = _rate(rows, "kimi-mlx")
    peak = next(row.peak_bytes for row in rows if row.side == "kimi-mlx")
    budget = memory.expert_bytes + memory.rest_bytes
    against_map, against_lru = ours / _rate(rows, "memory map"), ours / _rate(rows, "plain LRU")
    of_bound = ours / bound.tok_per_s
    expected, read = _expected_and_read(runs)
    digests = [{run.result.logits for run in runs if run.repetition == number} - {""} for number in _repetitions(runs)]
    return [
        Target(
            f"peak memory at most {MAX_PEAK} times the budget",
            f"{format_bytes(peak)} of {format_bytes(budget)} ({peak / budget:.2f})",
            peak <= MAX_PEAK * budget,
        ),
        Target(
            "bytes read = (misses + wrong guesses that had begun) x size of an expert",
            f"{read:,} of {expected:,}",
            expected == read,
        ),
        Target(
            f"at least {MIN_AGAINST_MAP} times the memory map", f"{against_map:.2f}", against_map >= MIN_AGAINST_MAP
        ),
        Target("not slower than plain LRU", f"{against_lru:.2f}", against_lru >= MIN_AGAINST_LRU),
        Target(
            f"at least {MIN_OF_BOUND} of the bound",
            f"{of_bound:.2f} of {bound.tok_per_s:.2f} tok/s (read {1000 * bound.read_s:.0f} ms, compute "
            f"{1000 * bound.compute_s:.0f} ms)",
            of_bound >= MIN_OF_BOUND,
        ),
        Target(
            "logits of all sides equal in every bit",
            "equal" if all(len(digest) == 1 for digest in digests) else "different",
            all(len(digest) == 1 for digest in digests),
        ),
    ]


def _expected_and_read(runs: Sequence[StreamingRun]) -> tuple[int, int]:
    """Return the bytes that counted reads of kimi-mlx and LRU must have taken, and the counted bytes."""
    counts = [run.result.stats for run in runs if run.result.stats is not None]
    expected = sum(
        (count["misses"] + count["guesses"] - count["guesses_right"] - count["guesses_cancelled"])
        * count["expert_bytes"]
        for count in counts
    )
    return expected, sum(count["bytes_read"] for count in counts)


def _repetitions(runs: Sequence[StreamingRun]) -> list[int]:
    return sorted({run.repetition for run in runs})


def _rate(rows: Sequence[StreamingRow], side: str) -> float:
    return next(row.tok_per_s.median for row in rows if row.side == side)


def heading(files: StreamingFiles, memory: Memory, runs: Sequence[StreamingRun], bound: Bound) -> list[str]:
    """Return the model, the memory and the machine."""
    experts = [file.experts for file in files.manifest.files if file.experts is not None]
    loads = [run.load_average for run in runs]
    limited = [run.is_limited for run in runs if run.side not in ("resident", "disk")]
    how = "by a control group" if all(limited) else "counted only: no control group with a limit could be created"
    disk = bound.disk_bytes_per_s
    return [
        f"{format_bytes(files.size_bytes)}: {len(experts)} layers of {experts[0].num_experts} experts of "
        f"{experts[0].record.record_bytes / MB:.2f} MB, {files.bits} bits, popularity 1 / rank^{files.exponent:g}",
        f"process limited to {format_bytes(memory.limit_bytes)} ({how}), of which {format_bytes(memory.expert_bytes)} "
        f"for experts; {runs[0].caches}",
        f"disk: {disk.median / MB:.0f} MB/s ({disk.min / MB:.0f}-{disk.max / MB:.0f}) in random reads of experts; "
        f"load {min(loads):.1f} to {max(loads):.1f}; {len(_repetitions(runs))} repetitions, median (min-max)",
    ]


COLUMNS: Sequence[tuple[str, Callable[[StreamingRow], str]]] = (
    ("side", lambda row: row.side),
    ("tok/s", lambda row: f"{row.tok_per_s.median:.2f} ({row.tok_per_s.min:.2f}-{row.tok_per_s.max:.2f})"),
    ("CPU ms per token", lambda row: f"{1000 * row.cpu_s_per_token:.0f}"),
    ("hits", lambda row: _percent(row.hit_rate)),
    (
        "MB read per token",
        lambda row: "" if row.read_bytes_per_token is None else f"{row.read_bytes_per_token / MB:.1f}",
    ),
    ("waited for reads", lambda row: _percent(row.waited)),
    ("guesses right", lambda row: _percent(row.guesses_right)),
    ("peak MB", lambda row: f"{row.peak_bytes / MB:.0f}"),
)


def streaming_table(rows: Sequence[StreamingRow]) -> Table:
    """Return the table for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, _ in COLUMNS:
        table.add_column(name, justify="left" if name == "side" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in COLUMNS))
    return table


def streaming_to_dict(
    files: StreamingFiles, memory: Memory, runs: Sequence[StreamingRun], settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the report for JSON."""
    rows = streaming_rows(runs)
    bound = Bound.of(runs, rows)
    return {
        **settings,
        "size_bytes": files.size_bytes,
        "bits": files.bits,
        "exponent": files.exponent,
        "limit_bytes": memory.limit_bytes,
        "expert_memory_bytes": memory.expert_bytes,
        "rest_bytes": memory.rest_bytes,
        "bound": {**asdict(bound), "tok_per_s": bound.tok_per_s},
        "results": [asdict(row) for row in rows],
        "targets": [asdict(target) for target in targets(runs, rows, memory, bound)],
        "runs": [run.to_dict() for run in runs],
    }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"

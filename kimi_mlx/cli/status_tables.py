"""The status of a model for a terminal: facts, and ranks as a table, or as lines if the table does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.chat.output.terminal_text import to_line
from kimi_mlx.session.model_status import ModelStatus, RankStatus
from kimi_mlx.units import format_duration, format_gib

DISPENSABLE = ("peak", "cache", "step")
"""Columns that are left out, in this order, if the table does not fit the terminal."""

GAP = 2
"""Spaces between two columns."""


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name, style="dim"), Text(to_line(value)))
    return table


def run_facts(status: ModelStatus) -> Iterator[tuple[str, str]]:
    """Yield restarts, uptime and versions of a model, if known."""
    if status.restarts:
        yield "restarts", f"{len(status.restarts)}, the last one: {status.restarts[-1].reason}"
    if status.uptime_s:
        yield "up", format_duration(status.uptime_s)
    if status.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in status.versions.items())


def describe_ranks(ranks: Sequence[RankStatus], width: int, *, shows_activity: bool = False) -> RenderableType:
    """Return the ranks as a table, or as lines if the table does not fit. Columns without values are left out.

    Args:
        ranks: ranks in order.
        width: width of the terminal.
        shows_activity: whether to show the work, step and last message of each rank.
    """
    columns = _columns(ranks, shows_activity)
    for name in DISPENSABLE:
        if _width(columns) > width:
            columns.pop(name, None)
    return _table(columns) if _width(columns) <= width else _lines(ranks, shows_activity)


def _columns(ranks: Sequence[RankStatus], shows_activity: bool) -> dict[str, list[str]]:
    columns = {
        "rank": [str(rank.rank) for rank in ranks],
        "host": [rank.host for rank in ranks],
        "holds": [rank.share for rank in ranks],
        "weights": [_size(rank.weights_bytes) for rank in ranks],
        "cache": [_size(rank.cache_bytes) for rank in ranks],
        "peak": [_size(rank.peak_memory_bytes) for rank in ranks],
        "free": [_size(rank.free_bytes) for rank in ranks],
    }
    if shows_activity:
        columns |= {
            "work": [rank.work for rank in ranks],
            "step": ["" if rank.step is None else f"{rank.step:,}" for rank in ranks],
            "last message": [_age(rank.last_message_s) for rank in ranks],
        }
    return {name: [to_line(value) for value in values] for name, values in columns.items() if any(values)}


def _width(columns: dict[str, list[str]]) -> int:
    """Return the number of cells of a terminal that a table needs."""
    widths = [max(cell_len(cell) for cell in (name, *cells)) for name, cells in columns.items()]
    return sum(widths) + GAP * (len(widths) - 1)


def _table(columns: dict[str, list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, justify="left" if name in ("host", "holds", "work") else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def _lines(ranks: Sequence[RankStatus], shows_activity: bool) -> Group:
    lines: list[Text] = []
    for rank in ranks:
        sizes = [(rank.weights_bytes, "weights"), (rank.cache_bytes, "cache"), (rank.free_bytes, "free")]
        parts = [rank.share, *(f"{format_gib(size)} {name}" for size, name in sizes if size)]
        if shows_activity and rank.step is not None:
            parts.append(f"{rank.work}, step {rank.step:,}")
        if shows_activity and rank.last_message_s is not None:
            parts.append(f"last message {_age(rank.last_message_s)}")
        lines.append(Text(to_line(f"rank {rank.rank} on {rank.host}: {', '.join(filter(None, parts))}")))
    return Group(*lines)


def _age(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s ago"


def _size(size_bytes: int | None) -> str:
    return format_gib(size_bytes) if size_bytes else ""

"""A model's folder for a command: what is on this machine, else fetched from the hub behind a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kimi_mlx.cli.output import stderr
from kimi_mlx.hub.client import Repository, fetch_checkpoint, look_up
from kimi_mlx.hub.licence import show_once
from kimi_mlx.model.names import IGNORED_PREFIXES
from kimi_mlx.store.locate import Target, find
from kimi_mlx.weights.index import read_index


def obtain(target: Target, ranks: int, is_quiet: bool) -> Path:
    """The folder of a model, fetched if it is not here.

    Args:
        target: the model.
        ranks: how many will share it.
        is_quiet: without progress and notices.

    Raises:
        WeightsError: it cannot be fetched, or is here as a store of another placement.
    """
    folder = find(target, ranks)
    if folder is not None:
        return folder
    assert target.repository is not None
    return fetch(target, look_up(target.repository), is_quiet)


def fetch(target: Target, repository: Repository, is_quiet: bool) -> Path:
    """The whole checkpoint into the hub's cache."""
    tell_licence(target, is_quiet)
    total = sum(file.size_bytes for file in repository.files)
    with byte_progress(f"fetching {target.name}", total, is_quiet) as advance:
        folder = fetch_checkpoint(repository, advance)
    if not is_quiet and any(name.startswith(IGNORED_PREFIXES) for name in read_index(folder)):
        stderr.print("the vision part is left out: text only", style="dim")
    return folder


def tell_licence(target: Target, is_quiet: bool) -> None:
    """What the licence of the weights asks of large products, at the first download."""
    if target.entry is not None and not is_quiet:
        show_once(target.entry, lambda text: stderr.print(text, style="dim", markup=False))


@contextmanager
def byte_progress(what: str, total_bytes: int, is_quiet: bool) -> Generator[Callable[[int], None]]:
    """A bar of bytes with speed and time left, on stderr of a terminal; yields what to call with more bytes."""
    with byte_bars(is_quiet) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda count: progress.advance(task, count)


def byte_bars(is_quiet: bool) -> Progress:
    """Bars of bytes; a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=is_quiet or not stderr.is_terminal,
    )

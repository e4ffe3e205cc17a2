"""A model's folder for a command: what is on this machine, else fetched from the hub behind a progress bar."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from kimi_mlx.cli.download_progress import byte_progress, print_licence_once
from kimi_mlx.cli.output import stderr
from kimi_mlx.cluster.hosts.machine import this_machine
from kimi_mlx.errors import UsageError
from kimi_mlx.hub.cache import cached_bytes
from kimi_mlx.hub.client import Repository, fetch_checkpoint, look_up
from kimi_mlx.model.names import IGNORED_PREFIXES
from kimi_mlx.store.locate import ModelRef, find_local_model
from kimi_mlx.units import GB, format_bytes
from kimi_mlx.weights.index import read_index

UNASKED_BYTES = 5 * GB
"""What a command that needs a model fetches without asking."""


def fetch_model(target: ModelRef, ranks: int, strategy: str, is_quiet: bool) -> Path:
    """The folder of a model, fetched if it is not here; a large one only after a yes.

    Args:
        target: the model.
        ranks: how many will share it.
        strategy: how.
        is_quiet: without progress and notices.

    Raises:
        UsageError: it is large, and there is nobody to ask.
        WeightsError: it cannot be fetched, or is here as a store that is broken or of another placement.
    """
    folder = find_local_model(target, ranks, strategy)
    if folder is not None:
        return folder
    assert target.repository is not None
    repository = look_up(target.repository)
    _ask(target, repository, is_quiet)
    return fetch(target, repository, is_quiet)


def fetch(target: ModelRef, repository: Repository, is_quiet: bool) -> Path:
    """The whole checkpoint into the hub's cache."""
    print_licence_once(target, is_quiet)
    total = sum(file.size_bytes for file in repository.files)
    with byte_progress(f"fetching {target.name}", total, is_quiet) as advance:
        folder = fetch_checkpoint(repository, advance)
    if not is_quiet and any(name.startswith(IGNORED_PREFIXES) for name in read_index(folder)):
        stderr.print("the vision part is left out: text only", style="dim")
    return folder


def _ask(target: ModelRef, repository: Repository, is_quiet: bool) -> None:
    """Whether to fetch a large model; what is half here has been agreed to."""
    sizes = {file.name: file.size_bytes for file in repository.files}
    missing = sum(sizes.values()) - sum(cached_bytes(repository, file) for file in repository.files)
    if missing <= UNASKED_BYTES or missing < sum(sizes.values()) / 2:
        return
    text = f"`{target.name}` is not here: {format_bytes(missing)} to fetch"
    needed = target.entry.minimum_memory_bytes() if target.entry is not None else None
    if needed is not None:
        text += f"; it needs {format_bytes(needed)} of memory, this machine has "
        text += format_bytes(this_machine().memory_bytes)
    if is_quiet or not (sys.stdin.isatty() and stderr.is_terminal):
        raise UsageError(text, hint=f"`kimi-mlx download {target.name}` fetches it")
    if not typer.confirm(f"{text}. Fetch it?", default=False, err=True):
        raise typer.Exit(1)

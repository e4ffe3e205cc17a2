"""Find the folder of a model on this machine, or download it behind a progress bar."""

from __future__ import annotations

from pathlib import Path

import typer

from kimi_mlx.cli.confirm import can_ask
from kimi_mlx.cli.download_progress import byte_progress, print_licence_once
from kimi_mlx.cli.model_size import entry_shape
from kimi_mlx.cli.output import slow_status, stderr
from kimi_mlx.cluster.hosts.machine import LocalMachine, local_machine
from kimi_mlx.errors import UsageError
from kimi_mlx.files import free_disk_bytes
from kimi_mlx.hub.cache import cached_bytes, snapshot_folder
from kimi_mlx.hub.client import Repository, complete_checkpoint, fetch_checkpoint, find_repository
from kimi_mlx.hub.environment import hub_cache
from kimi_mlx.model.config import load_config
from kimi_mlx.planner.needs import memory_per_host
from kimi_mlx.sizing.hosts import usable_bytes
from kimi_mlx.store.locate import find_local_model
from kimi_mlx.store.model_ref import ModelRef
from kimi_mlx.store.vision import checkpoint_lacks_vision, sees_images
from kimi_mlx.units import GB, MB, format_bytes, format_gib

MAX_UNCONFIRMED_BYTES = 5 * GB
"""Largest download that starts without confirmation."""

TYPICAL_LINES = {"100 Mbit/s": 12.5 * MB, "1 Gbit/s": 125 * MB}
"""Bytes per second of connections to the internet, for the time that a download takes."""


def fetch_model(target: ModelRef, ranks: int, strategy: str, is_quiet: bool) -> Path:
    """Return the folder of a model; it is downloaded if it is not here, a large one only after a question.

    Args:
        target: the model.
        ranks: number of ranks that will share the model.
        strategy: strategy of the ranks.
        is_quiet: whether to print neither progress nor notices.

    Raises:
        UsageError: the model is large and there is no terminal to ask on.
        WeightsError: the model cannot be downloaded, or its store is broken or has another placement.
    """
    folder = find_local_model(target, ranks, strategy)
    if target.repository is None:
        assert folder is not None
        return folder
    if folder is not None:
        return complete_checkpoint(target.repository, folder, lambda repository: fetch(target, repository, is_quiet))
    with slow_status(is_quiet) as set_status:
        set_status(f"asking Hugging Face for the files of {target.name}")
        repository = find_repository(target.repository)
    if repository.is_local:
        return snapshot_folder(repository)
    _confirm(target, repository, is_quiet)
    return fetch(target, repository, is_quiet)


def fetch(target: ModelRef, repository: Repository, is_quiet: bool) -> Path:
    """Download a whole checkpoint into the Hugging Face cache and return its folder."""
    print_licence_once(target, is_quiet)
    total = sum(file.size_bytes for file in repository.files)
    with byte_progress(f"downloading {target.name}", total, is_quiet) as advance:
        folder = fetch_checkpoint(repository, advance)
    if is_quiet:
        return folder
    if checkpoint_lacks_vision(folder):
        stderr.print("the vision tower is left out: images will be refused", style="dim")
    elif repository.skips_vision and sees_images(folder, load_config(folder)):
        stderr.print("the vision tower is in files with other weights, so it is downloaded, too", style="dim")
    return folder


def _confirm(target: ModelRef, repository: Repository, is_quiet: bool) -> None:
    """Ask before a large download; one that is half done was confirmed before.

    Raises:
        UsageError: there is no terminal to ask on.
        typer.Exit: the answer is no.
    """
    sizes = {file.name: file.size_bytes for file in repository.files}
    missing = sum(sizes.values()) - sum(cached_bytes(repository, file) for file in repository.files)
    if missing <= MAX_UNCONFIRMED_BYTES or missing < sum(sizes.values()) / 2:
        return
    shape = entry_shape(target.entry) if target.entry is not None else None
    needed = None if shape is None else memory_per_host(shape)
    text = describe_download(target.name, missing, free_disk_bytes(hub_cache()), needed, local_machine())
    if is_quiet or not can_ask():
        raise UsageError(text, hint=f"download it with `kimi-mlx download {target.name}`")
    if not typer.confirm(f"{text}. Download it?", default=False, err=True):
        raise typer.Exit(1)


def describe_download(
    name: str, num_bytes: int, free_bytes: int, needed_bytes: int | None, machine: LocalMachine
) -> str:
    """Return what the user should know before a large download: size, time, free disk, and whether the model fits.

    Args:
        name: name of the model.
        num_bytes: size of what is missing.
        free_bytes: free space of the disk.
        needed_bytes: memory that the model needs on one host; None if it is not known.
        machine: this machine.
    """
    times = " or ".join(f"{_hours(num_bytes / rate)} at {line}" for line, rate in TYPICAL_LINES.items())
    text = f"`{name}` is not on this machine: {format_bytes(num_bytes)} to download ({times})"
    text += f"; the disk has {format_bytes(free_bytes)} free"
    if free_bytes < num_bytes:
        text += ", which is too little"
    if needed_bytes is not None:
        text += f"; it needs {format_gib(needed_bytes)} of memory, this machine has {format_gib(machine.memory_bytes)}"
        if needed_bytes > min(usable_bytes(machine.memory_bytes), machine.gpu_bytes):
            is_close = needed_bytes <= usable_bytes(machine.memory_bytes)
            limit = f", and lets the GPU use {format_gib(machine.gpu_bytes)} of it (`kimi-mlx models {name}`)"
            text += limit if is_close else ", so it does not fit"
    return text


def _hours(seconds: float) -> str:
    """Return a duration in round numbers, such as `13 h` or `12 min`."""
    return f"{seconds / 3600:.0f} h" if seconds >= 5400 else f"{max(seconds / 60, 1):.0f} min"

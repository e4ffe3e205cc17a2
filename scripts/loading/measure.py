"""The loading benchmark: each load in fresh processes, a rank each, the sides in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.cluster.ring.messages import Message
from kimi_mlx.cluster.ring.ring import Ring
from scripts.loading.files import LoadingFiles, drop_caches


@dataclass(frozen=True)
class LoadingSide:
    """One way to load.

    Args:
        name: in tables.
        module: what a rank runs.
        folders: what each rank reads.
        dtype: of kimi-mlx's floats: None is its default.
        mode: of mlx-lm.
    """

    name: str
    module: str
    folders: tuple[Path, ...]
    dtype: str | None = None
    mode: str | None = None


@dataclass(frozen=True)
class Load:
    """What one rank took to load its share.

    Args:
        seconds: from all ranks being ready until every parameter is in memory.
        read_bytes: read by calls, from the page cache or the disk; memory maps do not count. None without /proc.
        disk_bytes: read from the disk, read-ahead included. None without /proc.
        held_bytes: of all parameters at the end.
        peak_bytes: most memory of the process (RSS) while it loaded, less what it had before.
        mlx_peak_bytes: most memory that MLX had allocated, less what it had before.
    """

    seconds: float
    read_bytes: int | None
    disk_bytes: int | None
    held_bytes: int
    peak_bytes: int
    mlx_peak_bytes: int

    @property
    def needed_bytes(self) -> int | None:
        """What had to be read: by calls or through memory maps, whichever shows it."""
        if self.read_bytes is None or self.disk_bytes is None:
            return None
        return max(self.read_bytes, self.disk_bytes)


@dataclass(frozen=True)
class LoadingRun:
    """One load of one side.

    Args:
        side: its name.
        repetition: from 0.
        loads: of each rank.
        total_s: from starting the processes until all ranks have loaded, without the dropping of caches.
        caches: what was done to the page cache before.
    """

    side: str
    repetition: int
    loads: tuple[Load, ...]
    total_s: float
    caches: str


def loading_sides(files: LoadingFiles, stored_dtype: str, default_dtype: str, is_against: bool) -> list[LoadingSide]:
    """The sides to compare, kimi-mlx's store in the checkpoint's own dtype first.

    Args:
        files: what they read.
        stored_dtype: of the checkpoint's floats, which mlx-lm keeps; the names tell others.
        default_dtype: of kimi-mlx on this machine.
        is_against: whether mlx-lm takes part.
    """
    ours, theirs = "scripts.loading.rank", "scripts.loading.mlx_lm_rank"
    stores = (files.stores,) * len(files.copies)
    sides = [LoadingSide("kimi-mlx store", ours, stores, stored_dtype)]
    if default_dtype != stored_dtype:
        sides.append(LoadingSide(f"kimi-mlx store {default_dtype}", ours, stores, default_dtype))
    sides.append(LoadingSide("kimi-mlx checkpoint", ours, files.copies, stored_dtype))
    if is_against:
        sides += [LoadingSide(f"mlx-lm {mode}", theirs, files.copies, mode=mode) for mode in ("tensor", "pipeline")]
    return sides


def measure_loading(
    sides: Sequence[LoadingSide], repeat: int, progress: Callable[[LoadingRun], None] = lambda run: None
) -> list[LoadingRun]:
    """Load with each side, again and again; the order turns around each time so that none profits.

    Raises:
        KimiMlxError: a side cannot load, or a rank is lost.
    """
    runs: list[LoadingRun] = []
    for repetition in range(repeat):
        for side in sides if repetition % 2 == 0 else sides[::-1]:
            runs.append(run_loading(side, repetition))
            progress(runs[-1])
    return runs


def run_loading(side: LoadingSide, repetition: int = 0) -> LoadingRun:
    """Load once, in fresh processes, with cold caches where the system allows it."""
    with closing(Ring(local_cluster(len(side.folders)), module=side.module)) as ring:
        started = time.monotonic()
        ring.start(folders=[str(folder) for folder in side.folders], dtype=side.dtype, mode=side.mode)
        messages = ring.messages()
        _from_all(messages, "ready", ring.world_size)
        ready = time.monotonic()
        caches = drop_caches(side.folders)
        told = time.monotonic()
        ring.send("load")
        found = _from_all(messages, "measured", ring.world_size)
        total_s = ready - started + time.monotonic() - told
    loads = tuple(Load(**found[rank]["load"]) for rank in sorted(found))
    return LoadingRun(side.name, repetition, loads, total_s, caches)


def _from_all(messages: Iterator[tuple[int, Message]], kind: str, count: int) -> dict[int, Message]:
    """One message of each rank."""
    found: dict[int, Message] = {}
    for rank, message in messages:
        if message["kind"] == kind:
            found[rank] = message
        if len(found) == count:
            break
    return found

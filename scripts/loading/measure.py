"""The loading benchmark: every load runs in new processes, one per rank; sides alternate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.cluster.ring.ring import Ring
from scripts.loading.files import LoadingFiles, drop_caches


@dataclass(frozen=True)
class LoadingSide:
    """One way to load.

    Args:
        name: name in tables.
        module: module that a rank runs.
        folders: folder that each rank reads.
        dtype: compute dtype of kimi-mlx; None for its default.
        mode: mode of mlx-lm.
    """

    name: str
    module: str
    folders: tuple[Path, ...]
    dtype: str | None = None
    mode: str | None = None


@dataclass(frozen=True)
class Load:
    """Measurements of one rank that loads its share.

    Args:
        seconds: time from the moment when all ranks are ready until every parameter is in memory.
        read_bytes: bytes read by system calls, from page cache or disk, without memory maps; None without /proc.
        disk_bytes: bytes read from the disk, including read-ahead; None without /proc.
        held_bytes: size of all parameters at the end.
        peak_bytes: peak RSS of the process during the load, minus its RSS before.
        mlx_peak_bytes: peak of the memory allocated by MLX, minus the amount before.
    """

    seconds: float
    read_bytes: int | None
    disk_bytes: int | None
    held_bytes: int
    peak_bytes: int
    mlx_peak_bytes: int

    @property
    def needed_bytes(self) -> int | None:
        """Bytes that had to be read, by system calls or through memory maps: the larger of both counts."""
        if self.read_bytes is None or self.disk_bytes is None:
            return None
        return max(self.read_bytes, self.disk_bytes)


@dataclass(frozen=True)
class LoadingRun:
    """One load of one side.

    Args:
        side: name of the side.
        repetition: number of the repetition, from 0.
        loads: measurements of each rank.
        total_s: time from the start of the processes until all ranks have loaded, without dropping caches.
        caches: method by which the page cache was dropped before.
    """

    side: str
    repetition: int
    loads: tuple[Load, ...]
    total_s: float
    caches: str


def loading_sides(files: LoadingFiles, stored_dtype: str, default_dtype: str, has_mlx_lm: bool) -> list[LoadingSide]:
    """Return the sides to compare. The first is kimi-mlx's store in the checkpoint's own dtype.

    Args:
        files: files of the benchmark.
        stored_dtype: dtype of the checkpoint's floats, which mlx-lm keeps. Names of sides include other dtypes.
        default_dtype: default dtype of kimi-mlx on this machine.
        has_mlx_lm: whether to include mlx-lm.
    """
    ours, theirs = "scripts.loading.rank", "scripts.loading.mlx_lm_rank"
    stores = (files.stores,) * len(files.copies)
    sides = [LoadingSide("kimi-mlx store", ours, stores, stored_dtype)]
    if default_dtype != stored_dtype:
        sides.append(LoadingSide(f"kimi-mlx store {default_dtype}", ours, stores, default_dtype))
    sides.append(LoadingSide("kimi-mlx checkpoint", ours, files.copies, stored_dtype))
    if has_mlx_lm:
        sides += [LoadingSide(f"mlx-lm {mode}", theirs, files.copies, mode=mode) for mode in ("tensor", "pipeline")]
    return sides


def measure_loading(
    sides: Sequence[LoadingSide], repeat: int, progress: Callable[[LoadingRun], None] = lambda run: None
) -> list[LoadingRun]:
    """Load with each side, repeatedly; the order alternates so that no side has an advantage.

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
    """Load once in new processes, with cold caches if the system allows it."""
    with closing(Ring(local_cluster(len(side.folders)), module=side.module)) as ring:
        started = time.monotonic()
        ring.start(folders=[str(folder) for folder in side.folders], dtype=side.dtype, mode=side.mode)
        messages = ring.messages()
        _from_all(messages, "ready", ring.world_size)
        ready = time.monotonic()
        caches = drop_caches(side.folders)
        sent = time.monotonic()
        ring.send("load")
        results = _from_all(messages, "measured", ring.world_size)
        total_s = ready - started + time.monotonic() - sent
    loads = tuple(Load(**results[rank]["load"]) for rank in sorted(results))
    return LoadingRun(side.name, repetition, loads, total_s, caches)


def _from_all(messages: Iterator[tuple[int, Message]], kind: str, count: int) -> dict[int, Message]:
    """Wait for a message of this kind from each rank; return them by rank."""
    received: dict[int, Message] = {}
    for rank, message in messages:
        if message["kind"] == kind:
            received[rank] = message
        if len(received) == count:
            break
    return received

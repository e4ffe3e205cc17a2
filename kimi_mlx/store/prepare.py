"""Prepare shard stores for the user: find, check, repair, build or only plan them, alone or over a group."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from kimi_mlx.errors import WeightsError
from kimi_mlx.parallel.group import Group
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.disk import store_disk_bytes
from kimi_mlx.store.download import StoreOptions, any_host, build, find_built_stores, open_build_job
from kimi_mlx.store.locate import ModelRef
from kimi_mlx.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from kimi_mlx.store.rounds import BuildProgress
from kimi_mlx.store.sources import CheckpointContents
from kimi_mlx.store.stores import LocalStore, broken_files, files_of_wrong_size, rank_folder, stored_ranks
from kimi_mlx.weights.checkpoint import vision_bytes_of

DownloadReport = dict[str, Any]
"""The JSON document of a download."""


class DownloadObserver(Protocol):
    """Observer of a download."""

    def on_start(self, vision_bytes: int) -> None:
        """Handle the start of a download, which skips `vision_bytes` of the repository."""
        ...

    def on_check(self, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show the verification of files; yields a callback for the number of bytes read."""
        ...

    def on_build(self) -> AbstractContextManager[Callable[[BuildProgress], None]]:
        """Show the building of stores; yields a callback for progress."""
        ...


def prepare_stores(
    target: ModelRef,
    options: StoreOptions,
    group: Group,
    listener: DownloadObserver,
    *,
    is_dry: bool = False,
    is_check: bool = False,
) -> DownloadReport:
    """Prepare the stores of all ranks; over a group, the store of this process's rank.

    Args:
        target: the model.
        options: stores to build.
        group: group of the hosts.
        listener: observer of the progress.
        is_dry: only report what would be done.
        is_check: verify checksums, and fetch broken files again.

    Returns:
        The JSON document of the download.

    Raises:
        KimiMlxError: an error of any host.
    """
    broken: Mapping[int, Sequence[str]] = {}
    ranks = range(options.ranks) if group.size == 1 else [group.rank]
    found = None if is_dry else find_built_stores(options, group)
    if found is not None:
        broken = _broken(found.folder, ranks, listener) if is_check else _cut_short(found.folder, ranks)
        if not any_host(any(broken.values()), group):
            return _stored(target, found, ranks, "is whole" if is_check else "is on this machine")
        options = replace(options, revision=found.origin.commit)
    job = open_build_job(options, group)
    if is_dry:
        holdings = {rank: job.size_bytes(rank) for rank in range(options.ranks)}
        disk_bytes = _disk_bytes(job, holdings, ranks)
        missing = sum(size - job.source.local_bytes(name) for name, size in job.source.contents.sizes.items())
        return dry_run_report(
            target, job.source.contents, holdings, missing if disk_bytes else 0, disk_bytes, options.stores
        )
    if is_check and found is None:
        broken = _broken(job.folder, [rank for rank in stored_ranks(job.folder) if rank in ranks], listener)
    listener.on_start(vision_bytes_of(job.checkpoint.tensors) + job.source.contents.vision_bytes)
    with listener.on_build() as report:
        manifests = build(options, job, group, report, broken)
    contents, names = job.source.contents, sorted({name for each in broken.values() for name in each})
    return {
        "model": target.name,
        "repository": contents.origin.repository,
        "commit": contents.origin.commit,
        "folder": str(job.folder),
        "state": describe_state(is_check, names, "is fetched and verified" if target.repository else "is built"),
        "broken": names,
        "kept_bytes": job.source.kept_bytes,
        "ranks": [{"rank": manifest.rank, "size_bytes": manifest.size_bytes} for manifest in manifests],
    }


def _broken(folder: Path, ranks: Sequence[int], listener: DownloadObserver) -> Mapping[int, Sequence[str]]:
    """Return the files with wrong checksums, unreadable manifests included."""
    broken: dict[int, Sequence[str]] = {}
    manifests: list[Manifest] = []
    for rank in ranks:
        try:
            manifests.append(read_manifest(rank_folder(folder, rank)))
        except WeightsError:
            broken[rank] = [MANIFEST_NAME]
    total = sum(manifest.size_bytes for manifest in manifests)
    with listener.on_check(total) as advance:
        return broken | {manifest.rank: broken_files(folder, manifest, advance) for manifest in manifests}


def _cut_short(folder: Path, ranks: Sequence[int]) -> Mapping[int, Sequence[str]]:
    """Return the files that are missing or have the wrong size."""
    manifests = (read_manifest(rank_folder(folder, rank)) for rank in ranks)
    return {manifest.rank: files_of_wrong_size(folder, manifest) for manifest in manifests}


def _disk_bytes(job: BuildJob, holdings: Mapping[int, int], ranks: Sequence[int]) -> int:
    """Return the disk space that this machine still needs."""
    missing = sum(max(0, holdings[rank] - store_disk_bytes(rank_folder(job.folder, rank))) for rank in ranks)
    return missing + job.source.extra_bytes(job.files) if missing else 0


def _stored(target: ModelRef, found: LocalStore, ranks: Sequence[int], state: str) -> DownloadReport:
    manifests = [read_manifest(rank_folder(found.folder, rank)) for rank in ranks]
    return {
        "model": target.name,
        "repository": found.origin.repository,
        "commit": found.origin.commit,
        "folder": str(found.folder),
        "state": state,
        "ranks": [{"rank": manifest.rank, "size_bytes": manifest.size_bytes} for manifest in manifests],
    }


def dry_run_report(
    target: ModelRef,
    contents: CheckpointContents,
    holdings: Mapping[int, int],
    fetch_bytes: int,
    disk_bytes: int,
    folder: Path,
) -> DownloadReport:
    """Return the report of a dry run."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return {
        "model": target.name,
        "repository": contents.origin.repository,
        "commit": contents.origin.commit,
        "files": [{"name": name, "size_bytes": size} for name, size in sorted(contents.sizes.items())],
        "small_bytes": sum(map(len, contents.small_files.values())),
        "ranks": [{"rank": rank, "size_bytes": size} for rank, size in holdings.items()],
        "fetch_bytes": fetch_bytes,
        "folder": str(folder),
        "disk_needed_bytes": disk_bytes,
        "disk_free_bytes": shutil.disk_usage(existing).free,
    }


def describe_state(is_check: bool, broken: list[str], done: str = "is fetched and verified") -> str:
    """Describe the result for one model."""
    if broken:
        return f"is repaired ({len(broken)} broken file{'s' * (len(broken) > 1)})"
    return "is whole" if is_check else done

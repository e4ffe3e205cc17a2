"""`kimi-mlx download --ranks`: find, verify, repair, build or only plan stores, on one machine or over a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from kimi_mlx.errors import UnreachableError, WeightsError
from kimi_mlx.files import free_disk_bytes
from kimi_mlx.hub.retries import LOG
from kimi_mlx.parallel.all_ranks import run_on_all_ranks
from kimi_mlx.parallel.group import Group
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.disk import store_disk_bytes
from kimi_mlx.store.download import StoreOptions, any_host, build, find_built_stores, open_build_job
from kimi_mlx.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from kimi_mlx.store.model_ref import ModelRef
from kimi_mlx.store.rewrite import rewrite_store, stacked_sizes
from kimi_mlx.store.rounds import BuildProgress
from kimi_mlx.store.sources import CheckpointContents
from kimi_mlx.store.store_folders import rank_folder, stored_ranks
from kimi_mlx.store.stores import LocalStore, broken_files, files_of_wrong_size
from kimi_mlx.store.vision import store_lacks_vision
from kimi_mlx.store.writer import unlisted_files
from kimi_mlx.units import format_count
from kimi_mlx.weights.checkpoint import vision_bytes_of

DownloadReport = dict[str, Any]
"""JSON document of a download."""


class DownloadObserver(Protocol):
    """Observer of a download."""

    def on_look_up(self) -> AbstractContextManager[None]:
        """Show that files are looked up in the hub, and that their headers are read."""
        ...

    def on_start(self, skipped_bytes: int) -> None:
        """Handle the start of a download.

        Args:
            skipped_bytes: bytes of the vision tower if it is left out; 0 if not.
        """
        ...

    def on_check(self, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show the verification of files; yields a callback for the number of newly read bytes."""
        ...

    def on_rewrite(self, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show the rewriting of stores of an earlier version; yields a callback for the number of newly read bytes."""
        ...

    def on_build(self) -> AbstractContextManager[Callable[[BuildProgress], None]]:
        """Show the building of stores; yields a callback for progress."""
        ...


def prepare_stores(
    model: ModelRef,
    options: StoreOptions,
    group: Group,
    observer: DownloadObserver,
    *,
    dry_run: bool = False,
    verify: bool = False,
) -> DownloadReport:
    """Prepare the stores of all ranks; over a group, the store of this process's rank.

    Args:
        model: the model.
        options: stores to build.
        group: group of the hosts.
        observer: observer of the progress.
        dry_run: whether to only report what would be done.
        verify: whether to verify checksums and build broken files again.

    Returns:
        JSON document of the download.

    Raises:
        KimiMlxError: an error of any host.
    """
    broken: Mapping[int, Sequence[str]] = {}
    is_complete = False
    ranks = range(options.ranks) if group.size == 1 else [group.rank]
    stores = None if dry_run else find_built_stores(options, group)
    if stores is not None:
        broken = _find_broken(stores.folder, ranks, observer) if verify else _find_truncated(stores.folder, ranks)
        is_complete = not any_host(any(broken.values()), group)
        can_add_vision = any_host(0 in ranks and store_lacks_vision(stores.folder), group)
        if is_complete and (options.skips_vision or not can_add_vision):
            rewritten = _rewrite(stores.folder, ranks, group, observer)
            state = ("is verified" if verify else "is on this machine") + rewritten
            return _report_stores(model, stores, ranks, state)
        # a repair keeps the tower that the store has
        skips_vision = options.skips_vision and can_add_vision
        options = replace(options, revision=stores.origin.commit, skips_vision=skips_vision)
    try:
        with observer.on_look_up():
            job = open_build_job(options, group)
    except UnreachableError as error:
        if not is_complete or stores is None:
            raise
        LOG.warning("note: the vision tower of `%s` cannot be added now: %s", model.name, error.message)
        return _report_stores(model, stores, ranks, "is on this machine, without its vision tower")
    if dry_run:
        return _dry_run(model, options, job, ranks)
    if verify and stores is None:
        broken = _find_broken(job.folder, [rank for rank in stored_ranks(job.folder) if rank in ranks], observer)
    vision_bytes = vision_bytes_of(job.source.contents.table) + job.source.contents.skipped_bytes
    observer.on_start(vision_bytes if options.skips_vision and job.source_has_vision else 0)
    with observer.on_build() as report:
        build(options, job, group, report, broken)
    rewritten = _rewrite(job.folder, ranks, group, observer)
    manifests = [read_manifest(rank_folder(job.folder, rank)) for rank in ranks]
    contents, broken_names = job.source.contents, sorted({name for files in broken.values() for name in files})
    state = describe_state(verify, broken_names, "is fetched and verified" if model.repository else "is built")
    return {
        "model": model.name,
        "repository": contents.origin.repository,
        "commit": contents.origin.commit,
        "folder": str(job.folder),
        "state": state + rewritten,
        "broken": broken_names,
        "kept_bytes": job.source.kept_bytes,
        "ranks": [{"rank": manifest.rank, "size_bytes": manifest.size_bytes} for manifest in manifests],
    }


def _dry_run(model: ModelRef, options: StoreOptions, job: BuildJob, ranks: Sequence[int]) -> DownloadReport:
    """Return the report of a dry run that would build stores."""
    contents = job.source.contents
    rank_bytes = {rank: job.size_bytes(rank) for rank in range(options.ranks)}
    files = _needed_files(job, ranks)
    disk_bytes = _disk_bytes(job, files, rank_bytes, ranks)
    files = files if disk_bytes else []
    missing_bytes = sum(contents.sizes[file] - job.source.local_bytes(file) for file in files)
    present = [rank for rank in stored_ranks(job.folder) if rank in ranks]
    stacked = [stacked_sizes(read_manifest(rank_folder(job.folder, rank))) for rank in present]
    sizes = [size for sizes in stacked for size in sizes]
    disk_bytes += max(sizes, default=0)
    report = dry_run_report(model, contents, rank_bytes, missing_bytes if files else 0, disk_bytes, options.stores)
    return report | ({"rewrite_bytes": sum(sizes)} if sizes else {})


def _rewrite(folder: Path, ranks: Sequence[int], group: Group, observer: DownloadObserver) -> str:
    """Rewrite the stores of an earlier version; return a text for the state of the model, empty if nothing was done.

    If the disk is full or read-only, the stores stay as they are, and a note is logged.
    """

    def rewrite() -> str:
        folders = [rank_folder(folder, rank) for rank in ranks]
        manifests = [read_manifest(path) for path in folders]
        total = sum(sum(stacked_sizes(manifest)) for manifest in manifests)
        if not total and not any(map(unlisted_files, folders, manifests)):
            return ""
        with observer.on_rewrite(total) as advance:
            problems = [rewrite_store(path, advance) for path in folders]
        for problem in problems:
            if problem is not None:
                LOG.warning("note: experts stay in stacks, which are slower to read: %s", problem.message)
        return "" if any(problems) else " and rewritten, with a record for each expert"

    return run_on_all_ranks(group, rewrite)


def _find_broken(folder: Path, ranks: Sequence[int], observer: DownloadObserver) -> Mapping[int, Sequence[str]]:
    """Return for each rank the files with a wrong checksum, or the manifest's name if that is unreadable."""
    broken: dict[int, Sequence[str]] = {}
    manifests: list[Manifest] = []
    for rank in ranks:
        try:
            manifests.append(read_manifest(rank_folder(folder, rank)))
        except WeightsError:
            broken[rank] = [MANIFEST_NAME]
    total = sum(manifest.size_bytes for manifest in manifests)
    with observer.on_check(total) as advance:
        return broken | {manifest.rank: broken_files(folder, manifest, advance) for manifest in manifests}


def _find_truncated(folder: Path, ranks: Sequence[int]) -> Mapping[int, Sequence[str]]:
    """Return for each rank the files that are missing or have a wrong size."""
    manifests = (read_manifest(rank_folder(folder, rank)) for rank in ranks)
    return {manifest.rank: files_of_wrong_size(folder, manifest) for manifest in manifests}


def _needed_files(job: BuildJob, ranks: Sequence[int]) -> list[str]:
    """Return the source files that the build still needs: those of the vision tower if only that is missing."""
    if not set(ranks) <= set(stored_ranks(job.folder)):
        return job.files
    if 0 not in ranks or not job.checkpoint.has_vision or not store_lacks_vision(job.folder):
        return []
    return [job.files[number] for number in sorted(job.sources_of_file(0)[-1])]


def _disk_bytes(job: BuildJob, files: Sequence[str], rank_bytes: Mapping[int, int], ranks: Sequence[int]) -> int:
    """Return the disk space that the build still needs on this machine, for the stores and for source files."""
    missing = sum(max(0, rank_bytes[rank] - store_disk_bytes(rank_folder(job.folder, rank))) for rank in ranks)
    return missing + job.source.extra_bytes(files) if files and missing else 0


def _report_stores(model: ModelRef, stores: LocalStore, ranks: Sequence[int], state: str) -> DownloadReport:
    manifests = [read_manifest(rank_folder(stores.folder, rank)) for rank in ranks]
    return {
        "model": model.name,
        "repository": stores.origin.repository,
        "commit": stores.origin.commit,
        "folder": str(stores.folder),
        "state": state,
        "ranks": [{"rank": manifest.rank, "size_bytes": manifest.size_bytes} for manifest in manifests],
    }


def dry_run_report(
    model: ModelRef,
    contents: CheckpointContents,
    rank_bytes: Mapping[int, int],
    fetch_bytes: int,
    disk_bytes: int,
    folder: Path,
) -> DownloadReport:
    """Return the report of a dry run.

    Args:
        model: the model.
        contents: contents of the checkpoint.
        rank_bytes: rank -> bytes of its store; empty for a download without stores.
        fetch_bytes: bytes that are still to be downloaded.
        disk_bytes: disk space that is still needed.
        folder: folder of the stores or of the download, which need not exist.
    """
    return {
        "model": model.name,
        "repository": contents.origin.repository,
        "commit": contents.origin.commit,
        "files": [{"name": name, "size_bytes": size} for name, size in sorted(contents.sizes.items())],
        "small_bytes": sum(map(len, contents.small_files.values())),
        "ranks": [{"rank": rank, "size_bytes": size} for rank, size in rank_bytes.items()],
        "fetch_bytes": fetch_bytes,
        "folder": str(folder),
        "disk_needed_bytes": disk_bytes,
        "disk_free_bytes": free_disk_bytes(folder),
    }


def describe_state(verify: bool, broken: list[str], done: str = "is fetched and verified") -> str:
    """Return the result for a model as a predicate, such as `is repaired (1 broken file)`.

    Args:
        verify: whether the files were verified.
        broken: names of the files that were broken.
        done: result of a download without `--verify`.
    """
    if broken:
        return f"is repaired ({format_count(len(broken), 'broken file')})"
    return "is verified" if verify else done

"""`kimi-mlx download`: a model from the hub, verified; with --ranks as shard stores."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kimi_mlx.cli.byte_progress import byte_bars, byte_progress
from kimi_mlx.cli.download_output import Result, print_result, require_disk
from kimi_mlx.cli.obtain import fetch, tell_licence
from kimi_mlx.cli.options import JsonOption, ModelArgument
from kimi_mlx.cli.output import print_json, stderr
from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.hub.cache import cached_bytes, repository_folder
from kimi_mlx.hub.client import (
    Repository,
    find_local,
    look_up,
    remove_cached,
    verify_checkpoint,
)
from kimi_mlx.parallel.group import Group
from kimi_mlx.parallel.together import together
from kimi_mlx.runtime.download import StoreOptions, any_host, build, find_built, join_group, open_job
from kimi_mlx.settings import Settings
from kimi_mlx.store.build import Job, Progress
from kimi_mlx.store.locate import Target, stores_root, understand
from kimi_mlx.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from kimi_mlx.store.sources import Contents, read_contents
from kimi_mlx.store.stores import FoundStore, broken_files, rank_folder, stored_ranks, wrong_sizes
from kimi_mlx.store.writer import stored_bytes
from kimi_mlx.units import format_bytes
from kimi_mlx.weights.checkpoint import vision_bytes_of


def download(
    model: ModelArgument = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=1,
            max=64,
            help="Build the shard stores of so many ranks; each source file is removed once it is worked up. "
            "Default: the checkpoint as it is, in the hub's cache.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="A branch, tag or commit. Default: what is here, else the main branch."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the files, what each host will hold, and the disk needed.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check all checksums of what is here, and fetch what is broken.")
    ] = False,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="With --ranks: keep the source files, in the hub's cache.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Fetch a model, verify it, and cut it into one store a rank."""
    started = time.monotonic()
    name = model or Settings.from_environment().model
    group = join_group()
    target = together(group, lambda: understand(name))
    is_quiet = json or group.rank > 0
    if group.size > 1:
        if ranks not in (None, group.size):
            raise UsageError(f"--ranks is {ranks}, but there are {group.size} hosts", hint="leave --ranks out")
        ranks = group.size
    if ranks is None and keep_source:
        raise UsageError("--keep-source is for --ranks", hint="without --ranks the files are kept anyway")
    try:
        if ranks is None:
            result = _checkpoint(target, revision, dry_run, verify, is_quiet)
        else:
            options = StoreOptions(target.source, stores_root(), ranks, revision=revision, keep_source=keep_source)
            result = _stores(target, options, group, dry_run, verify, is_quiet)
    except (KeyboardInterrupt, SystemExit):
        if not is_quiet:
            stderr.print("stopped; the same command goes on where it was", markup=False)
        raise
    if group.rank == 0:
        result["seconds"] = round(time.monotonic() - started, 3)
        if json:
            print_json(result)
        else:
            print_result(result)
        require_disk(result)


def _checkpoint(target: Target, revision: str | None, is_dry: bool, is_check: bool, is_quiet: bool) -> Result:
    """All of the repository into the hub's cache."""
    if target.repository is None:
        if is_check:
            raise UsageError(
                f"`{target.name}` is a folder: there are no checksums to compare it with",
                hint="with `--ranks N` the stores that were built from it are checked",
            )
        return {"model": target.name, "folder": str(target.folder), "state": "is on this machine"}
    local = find_local(target.repository, revision)
    if local is not None and revision not in (None, local.name):  # a branch may have moved on: ask the hub
        local = None
    if local is not None and not is_dry and not is_check:
        return {"model": target.name, "folder": str(local), "commit": local.name, "state": "is on this machine"}
    pinned = revision if local is None else local.name
    repository = look_up(target.repository, pinned)
    total = sum(file.size_bytes for file in repository.files)
    if is_dry:
        contents = read_contents(repository)
        missing = sum(size - cached_bytes(repository, repository.file(name)) for name, size in contents.sizes.items())
        return _dry(target, contents, {}, missing, missing, repository_folder(repository.name))
    broken: list[str] = []
    if is_check:
        with byte_progress(f"checking {target.name}", total, is_quiet) as advance:
            for file in verify_checkpoint(repository, advance):
                remove_cached(repository, file)
                broken.append(file.name)
    folder = fetch(target, repository, is_quiet)
    return {**_about(target, repository), "folder": str(folder), "state": _state(is_check, broken), "broken": broken}


def _stores(
    target: Target, options: StoreOptions, group: Group, is_dry: bool, is_check: bool, is_quiet: bool
) -> Result:
    """The stores of all ranks, or of this host's."""
    broken: Mapping[int, Sequence[str]] = {}
    ranks = range(options.ranks) if group.size == 1 else [group.rank]
    found = None if is_dry else find_built(options, group)
    if found is not None:
        broken = _broken(found.folder, ranks, is_quiet) if is_check else _cut_short(found.folder, ranks)
        if not any_host(any(broken.values()), group):
            return _stored(target, found, ranks, "is whole" if is_check else "is on this machine")
        options = replace(options, revision=found.origin.commit)
    job = open_job(options, group)
    if is_dry:
        holdings = {rank: job.size_bytes(rank) for rank in range(options.ranks)}
        disk_bytes = _disk_bytes(job, holdings, ranks)
        missing = sum(size - job.sources.held_bytes(name) for name, size in job.sources.contents.sizes.items())
        return _dry(target, job.sources.contents, holdings, missing if disk_bytes else 0, disk_bytes, options.stores)
    if is_check and found is None:
        broken = _broken(job.folder, [rank for rank in stored_ranks(job.folder) if rank in ranks], is_quiet)
    tell_licence(target, is_quiet)
    if not is_quiet and (vision_bytes := vision_bytes_of(job.checkpoint.tensors) + job.sources.contents.vision_bytes):
        stderr.print(f"the vision part ({format_bytes(vision_bytes)}) is left out: text only")
    with byte_bars(is_quiet) as bars:
        fetching = bars.add_task(f"fetching {target.name}", total=None)
        storing = bars.add_task("storing", total=None)

        def report(progress: Progress) -> None:
            bars.update(fetching, completed=progress.fetched_bytes, total=progress.total_bytes)
            bars.update(storing, completed=progress.stored_bytes, total=progress.total_bytes)

        manifests = build(options, job, group, report, broken)
    contents, names = job.sources.contents, sorted({name for each in broken.values() for name in each})
    return {
        "model": target.name,
        "repository": contents.origin.repository,
        "commit": contents.origin.commit,
        "folder": str(job.folder),
        "state": _state(is_check, names, "is fetched and verified" if target.repository else "is built"),
        "broken": names,
        "kept_bytes": job.sources.kept_bytes,
        "ranks": [{"rank": manifest.rank, "size_bytes": manifest.size_bytes} for manifest in manifests],
    }


def _broken(folder: Path, ranks: Sequence[int], is_quiet: bool) -> Mapping[int, Sequence[str]]:
    """The broken files of stores, by their checksums; a manifest that cannot be read is one of them."""
    broken: dict[int, Sequence[str]] = {}
    manifests: list[Manifest] = []
    for rank in ranks:
        try:
            manifests.append(read_manifest(rank_folder(folder, rank)))
        except WeightsError:
            broken[rank] = [MANIFEST_NAME]
    total = sum(manifest.size_bytes for manifest in manifests)
    with byte_progress("checking", total, is_quiet) as advance:
        return broken | {manifest.rank: broken_files(folder, manifest, advance) for manifest in manifests}


def _cut_short(folder: Path, ranks: Sequence[int]) -> Mapping[int, Sequence[str]]:
    """The files of stores that are missing or have another size."""
    manifests = (read_manifest(rank_folder(folder, rank)) for rank in ranks)
    return {manifest.rank: wrong_sizes(folder, manifest) for manifest in manifests}


def _disk_bytes(job: Job, holdings: Mapping[int, int], ranks: Sequence[int]) -> int:
    """What this machine needs in addition to what it has of the stores."""
    missing = sum(max(0, holdings[rank] - stored_bytes(rank_folder(job.folder, rank))) for rank in ranks)
    return missing + job.sources.extra_bytes(job.files) if missing else 0


def _state(is_check: bool, broken: list[str], done: str = "is fetched and verified") -> str:
    if broken:
        return f"is repaired ({len(broken)} broken file{'s' * (len(broken) > 1)})"
    return "is whole" if is_check else done


def _about(target: Target, repository: Repository) -> Result:
    return {"model": target.name, "repository": repository.name, "commit": repository.commit}


def _stored(target: Target, found: FoundStore, ranks: Sequence[int], state: str) -> Result:
    manifests = [read_manifest(rank_folder(found.folder, rank)) for rank in ranks]
    return {
        "model": target.name,
        "repository": found.origin.repository,
        "commit": found.origin.commit,
        "folder": str(found.folder),
        "state": state,
        "ranks": [{"rank": manifest.rank, "size_bytes": manifest.size_bytes} for manifest in manifests],
    }


def _dry(
    target: Target, contents: Contents, holdings: Mapping[int, int], fetch_bytes: int, disk_bytes: int, folder: Path
) -> Result:
    """What would be done."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return {
        "model": target.name,
        "repository": contents.origin.repository,
        "commit": contents.origin.commit,
        "files": [{"name": name, "size_bytes": size} for name, size in sorted(contents.sizes.items())],
        "small_bytes": sum(map(len, contents.small.values())),
        "ranks": [{"rank": rank, "size_bytes": size} for rank, size in holdings.items()],
        "fetch_bytes": fetch_bytes,
        "folder": str(folder),
        "disk_needed_bytes": disk_bytes,
        "disk_free_bytes": shutil.disk_usage(existing).free,
    }

"""`kimi-mlx download` on this machine, also as one of several processes under `mlx.launch`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from kimi_mlx.cli.download import DownloadOptions
from kimi_mlx.cli.download_output import show_result
from kimi_mlx.cli.download_progress import TerminalObserver, byte_progress
from kimi_mlx.cli.fetch_model import fetch
from kimi_mlx.cli.open_model import place_model
from kimi_mlx.cli.output import hides_messages, slow_status, stderr
from kimi_mlx.errors import UsageError
from kimi_mlx.hub.cache import cached_bytes, repository_folder
from kimi_mlx.hub.client import Repository, find_local, find_repository, look_up, remove_cached, verify_checkpoint
from kimi_mlx.hub.snapshots import damaged_files, unknown_files
from kimi_mlx.parallel.all_ranks import run_on_all_ranks
from kimi_mlx.parallel.group import Group
from kimi_mlx.store.download import StoreOptions, join_group
from kimi_mlx.store.hub_source import read_contents
from kimi_mlx.store.locate import stores_root
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name
from kimi_mlx.store.prepare import DownloadReport, describe_state, dry_run_report, prepare_stores
from kimi_mlx.store.vision import checkpoint_lacks_vision


def download_here(name: str, options: DownloadOptions, is_json: bool) -> None:
    """Download a model and print the result.

    Args:
        name: name of the model.
        options: options of the user.
        is_json: whether to print JSON.

    Raises:
        KimiMlxError: the model cannot be downloaded; the same command resumes.
    """
    started = time.monotonic()
    group = join_group()  # of several processes if `mlx.launch` started this one
    target = run_on_all_ranks(group, lambda: resolve_model_name(name))
    is_quiet = hides_messages(is_json) or group.rank > 0
    options = options.with_ranks(group.size)
    try:
        if options.ranks is None:
            result = _download_checkpoint(target, options, is_quiet)
        else:
            result = _download_stores(target, options, options.ranks, group, is_quiet)
    except (KeyboardInterrupt, SystemExit):
        if not is_quiet:
            stderr.print("stopped; run the same command again to resume", markup=False)
        raise
    if group.rank == 0:
        result["seconds"] = round(time.monotonic() - started, 3)
        show_result(result, is_json)


def _download_stores(
    target: ModelRef, options: DownloadOptions, ranks: int, group: Group, is_quiet: bool
) -> DownloadReport:
    """Build the stores of all ranks, or of this process's rank if it is one of several."""
    # under `mlx.launch`, processes do not know which stores the others have
    strategy = options.strategy if group.size == 1 else options.strategy or "hybrid"
    choice = place_model(target, ranks, strategy, is_quiet=is_quiet)
    store = StoreOptions(
        target.source,
        stores_root(),
        ranks,
        choice.strategy,
        options.revision,
        options.keep_source,
        skips_vision=options.no_vision,
    )
    observer = TerminalObserver(target, is_quiet)
    return prepare_stores(target, store, group, observer, dry_run=options.dry_run, verify=options.verify)


def _download_checkpoint(target: ModelRef, options: DownloadOptions, is_quiet: bool) -> DownloadReport:
    """Download a repository into the Hugging Face cache."""
    if target.repository is None:
        if options.verify:
            raise UsageError(
                f"`{target.name}` is a folder, so there are no checksums to compare with",
                hint="use `--ranks N` to check the stores that were built from it",
            )
        return {"model": target.name, "folder": str(target.folder), "state": "is on this machine"}
    local = find_local(target.repository, options.revision)
    damaged = [] if local is None else damaged_files(local)
    adds_vision = local is not None and not damaged and not options.no_vision and checkpoint_lacks_vision(local)
    is_complete = local is not None and not damaged and not unknown_files(local) and not adds_vision
    # False for the name of a branch, which may have a newer commit
    is_right_commit = local is not None and local.name.startswith(options.revision or "")
    has_work = options.dry_run or options.verify
    if local is not None and is_complete and is_right_commit and not has_work:
        return _report_local(target, local)
    list_files = find_repository if is_complete or adds_vision or has_work else look_up
    revision = local.name if local is not None and is_right_commit else options.revision
    with slow_status(is_quiet) as set_status:
        set_status(f"asking Hugging Face for the files of {target.name}")
        repository = replace(list_files(target.repository, revision), skips_vision=options.no_vision)
    if repository.is_local and local is not None and not has_work:  # offline: the newest commit is unknown
        return _report_local(target, local)
    if options.dry_run:
        with slow_status(is_quiet) as set_status:
            set_status("reading the headers of the files")
            contents = read_contents(repository)
        missing = sum(size - cached_bytes(repository, repository.file(name)) for name, size in contents.sizes.items())
        return dry_run_report(target, contents, {}, missing, missing, repository_folder(repository.name))
    broken = _remove_broken(target, repository, is_quiet) if options.verify else damaged
    for name in damaged if is_right_commit else ():
        remove_cached(repository, repository.file(name))
    folder = fetch(target, repository, is_quiet)
    return {
        "model": target.name,
        "repository": repository.name,
        "commit": repository.commit,
        "folder": str(folder),
        "state": describe_state(options.verify, broken),
        "broken": broken,
    }


def _report_local(target: ModelRef, folder: Path) -> DownloadReport:
    return {"model": target.name, "folder": str(folder), "commit": folder.name, "state": "is on this machine"}


def _remove_broken(target: ModelRef, repository: Repository, is_quiet: bool) -> list[str]:
    """Check all files in the cache, remove the broken ones and return their names."""
    total = sum(file.size_bytes for file in repository.files)
    broken: list[str] = []
    with byte_progress(f"checking {target.name}", total, is_quiet) as advance:
        for file in verify_checkpoint(repository, advance):
            remove_cached(repository, file)
            broken.append(file.name)
    return broken

"""`kimi-mlx download`: download and verify a model; with --ranks split into stores."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from kimi_mlx.cli.download_output import check_disk, print_result
from kimi_mlx.cli.download_progress import TerminalObserver, byte_progress
from kimi_mlx.cli.fetch_model import fetch
from kimi_mlx.cli.open_model import launch_context
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import ADVANCED, MODEL, JsonOption, ModelArgument, StrategyOption, model_name
from kimi_mlx.cli.output import print_json, stderr
from kimi_mlx.cli.placement import choose_placement, print_placement
from kimi_mlx.errors import UsageError
from kimi_mlx.hub.cache import cached_bytes, repository_folder
from kimi_mlx.hub.client import (
    Repository,
    find_local,
    look_up,
    remove_cached,
    verify_checkpoint,
)
from kimi_mlx.parallel.all_ranks import run_on_all_ranks
from kimi_mlx.parallel.group import Group
from kimi_mlx.parallel.placement import normalize_strategy
from kimi_mlx.planner.choice import Choice
from kimi_mlx.store.download import StoreOptions, join_group
from kimi_mlx.store.hub_source import read_contents
from kimi_mlx.store.locate import stores_root
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name
from kimi_mlx.store.prepare import DownloadReport, describe_state, dry_run_report, prepare_stores


@dataclass(frozen=True)
class DownloadOptions:
    """Options of a download."""

    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=1,
            max=64,
            help="Split the model for N ranks. Source files are deleted after processing. "
            "Default: download the checkpoint unchanged, into the Hugging Face cache.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    strategy: StrategyOption = None
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            help="Branch, tag or commit. Default: the one on this machine, else the main branch.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the files, the size of each rank's part, and the disk needed.")
    ] = False
    verify: Annotated[
        bool, typer.Option("--verify", help="Check all files on this machine and download broken ones again.")
    ] = False
    keep_source: Annotated[
        bool,
        typer.Option(
            "--keep-source",
            help="With --ranks: keep the source files in the Hugging Face cache.",
            rich_help_panel=ADVANCED,
        ),
    ] = False

    def with_ranks(self, num_hosts: int) -> DownloadOptions:
        """Return the options with the number of ranks; each of several hosts is one.

        Raises:
            UsageError: `--ranks` is another number, or an option needs `--ranks`.
        """
        options = self
        if num_hosts > 1:
            if self.ranks not in (None, num_hosts):
                raise UsageError(f"--ranks is {self.ranks}, but there are {num_hosts} hosts", hint="leave --ranks out")
            options = replace(self, ranks=num_hosts)
        if options.ranks is None and options.keep_source:
            raise UsageError("--keep-source needs --ranks", hint="without --ranks all files are kept anyway")
        if options.ranks is None and options.strategy is not None:
            raise UsageError("--strategy needs --ranks", hint="add the number of ranks, such as `--ranks 2`")
        return options


@with_option_groups
def download(
    context: typer.Context, options: DownloadOptions, model: ModelArgument = None, json: JsonOption = False
) -> None:
    """Download a model, optionally split for N ranks."""
    started = time.monotonic()
    name = model_name(model)
    if (launched := launch_context(context)) is not None:
        from kimi_mlx.cli.download_on_hosts import download_on_hosts

        download_on_hosts(
            launched,
            resolve_model_name(name),
            options.revision,
            is_dry=options.dry_run,
            is_check=options.verify,
            keep_source=options.keep_source,
            is_json=json,
        )
        return
    group = join_group()  # of several processes if `mlx.launch` started this one
    target = run_on_all_ranks(group, lambda: resolve_model_name(name))
    is_quiet = json or group.rank > 0
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
        if json:
            print_json(result)
        else:
            print_result(result)
        check_disk(result)


def _download_stores(
    target: ModelRef, options: DownloadOptions, ranks: int, group: Group, is_quiet: bool
) -> DownloadReport:
    """Build the stores of all ranks, or of this process's rank if it is one of several."""
    if group.size == 1:
        choice = choose_placement(target, ranks, options.strategy)
    else:  # started by `mlx.launch`: processes do not know which stores the others have
        strategy = normalize_strategy(options.strategy or "hybrid", ranks)
        choice = Choice(strategy, "under `mlx.launch` it is --strategy, or hybrid")
    print_placement(choice, f"{ranks} ranks", is_quiet)
    store = StoreOptions(target.source, stores_root(), ranks, choice.strategy, options.revision, options.keep_source)
    observer = TerminalObserver(target, is_quiet)
    return prepare_stores(target, store, group, observer, is_dry=options.dry_run, is_check=options.verify)


def _download_checkpoint(target: ModelRef, options: DownloadOptions, is_quiet: bool) -> DownloadReport:
    """Download the whole repository into the Hugging Face cache."""
    if target.repository is None:
        if options.verify:
            raise UsageError(
                f"`{target.name}` is a folder, so there are no checksums to compare with",
                hint="use `--ranks N` to check the stores that were built from it",
            )
        return {"model": target.name, "folder": str(target.folder), "state": "is on this machine"}
    local = find_local(target.repository, options.revision)
    if local is not None and options.revision not in (None, local.name):
        local = None  # a branch or tag: it may have a newer commit
    if local is not None and not options.dry_run and not options.verify:
        return {"model": target.name, "folder": str(local), "commit": local.name, "state": "is on this machine"}
    repository = look_up(target.repository, options.revision if local is None else local.name)
    if options.dry_run:
        contents = read_contents(repository)
        missing = sum(size - cached_bytes(repository, repository.file(name)) for name, size in contents.sizes.items())
        return dry_run_report(target, contents, {}, missing, missing, repository_folder(repository.name))
    broken = _remove_broken(target, repository, is_quiet) if options.verify else []
    folder = fetch(target, repository, is_quiet)
    return {
        "model": target.name,
        "repository": repository.name,
        "commit": repository.commit,
        "folder": str(folder),
        "state": describe_state(options.verify, broken),
        "broken": broken,
    }


def _remove_broken(target: ModelRef, repository: Repository, is_quiet: bool) -> list[str]:
    """Check all files in the cache, remove the broken ones and return their names."""
    total = sum(file.size_bytes for file in repository.files)
    broken: list[str] = []
    with byte_progress(f"checking {target.name}", total, is_quiet) as advance:
        for file in verify_checkpoint(repository, advance):
            remove_cached(repository, file)
            broken.append(file.name)
    return broken

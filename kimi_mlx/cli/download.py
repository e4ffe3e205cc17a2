"""`kimi-mlx download`: a model from the hub, verified; with --ranks as shard stores."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from kimi_mlx.cli.download_output import print_result, require_disk
from kimi_mlx.cli.download_progress import TerminalObserver, byte_progress
from kimi_mlx.cli.fetch_model import fetch
from kimi_mlx.cli.open_model import launch_context
from kimi_mlx.cli.options import JsonOption, ModelArgument, StrategyOption
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
from kimi_mlx.parallel.placement import normalize_strategy
from kimi_mlx.planner.choice import Choice
from kimi_mlx.settings import Settings
from kimi_mlx.store.download import StoreOptions, join_group
from kimi_mlx.store.locate import ModelRef, resolve_model_name, stores_root
from kimi_mlx.store.prepare import DownloadReport, describe_state, dry_run_report, prepare_stores
from kimi_mlx.store.sources import read_contents


def download(
    context: typer.Context,
    model: ModelArgument = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=1,
            max=64,
            help="Split the model for N ranks. Source files are deleted after processing. "
            "Default: the checkpoint as it is, in the hub's cache.",
            show_default=False,
        ),
    ] = None,
    strategy: StrategyOption = None,
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
    """Download a model, optionally split for N ranks."""
    started = time.monotonic()
    name = model or Settings.from_environment().model
    if (launched := launch_context(context)) is not None:
        from kimi_mlx.cli.download_on_hosts import download_over_hosts

        download_over_hosts(launched, resolve_model_name(name), revision, dry_run, verify, keep_source, is_json=json)
        return
    group = join_group()
    target = run_on_all_ranks(group, lambda: resolve_model_name(name))
    is_quiet = json or group.rank > 0
    if group.size > 1:
        if ranks not in (None, group.size):
            raise UsageError(f"--ranks is {ranks}, but there are {group.size} hosts", hint="leave --ranks out")
        ranks = group.size
    if ranks is None and keep_source:
        raise UsageError("--keep-source is for --ranks", hint="without --ranks the files are kept anyway")
    if ranks is None and strategy is not None:
        raise UsageError("--strategy is for --ranks", hint="say how many ranks will share the model: `--ranks 2`")
    try:
        if ranks is None:
            result = _checkpoint(target, revision, dry_run, verify, is_quiet)
        else:
            choice = choose_placement(target, ranks, strategy) if group.size == 1 else _place_on_group(ranks, strategy)
            print_placement(choice, f"{ranks} ranks", is_quiet)
            options = StoreOptions(target.source, stores_root(), ranks, choice.strategy, revision, keep_source)
            result = prepare_stores(
                target, options, group, TerminalObserver(target, is_quiet), is_dry=dry_run, is_check=verify
            )
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
        require_disk(result)


def _place_on_group(ranks: int, strategy: str | None) -> Choice:
    """Without `launch` hosts do not know of each other what they have: hybrid, unless --strategy says otherwise."""
    return Choice(
        normalize_strategy(strategy or "hybrid", ranks), "without launch it is what --strategy says, or hybrid"
    )


def _checkpoint(target: ModelRef, revision: str | None, is_dry: bool, is_check: bool, is_quiet: bool) -> DownloadReport:
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
        return dry_run_report(target, contents, {}, missing, missing, repository_folder(repository.name))
    broken: list[str] = []
    if is_check:
        with byte_progress(f"checking {target.name}", total, is_quiet) as advance:
            for file in verify_checkpoint(repository, advance):
                remove_cached(repository, file)
                broken.append(file.name)
    folder = fetch(target, repository, is_quiet)
    return {
        **_about(target, repository),
        "folder": str(folder),
        "state": describe_state(is_check, broken),
        "broken": broken,
    }


def _about(target: ModelRef, repository: Repository) -> DownloadReport:
    return {"model": target.name, "repository": repository.name, "commit": repository.commit}

"""Open a model for a command: name -> placement -> files -> session, on this machine or on launched hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from kimi_mlx.cli.calibration import calibrate_on
from kimi_mlx.cli.deployment import deployment_here, deployment_on_hosts
from kimi_mlx.cli.expert_note import describe_expectation, expectation_of, limit_hint
from kimi_mlx.cli.fetch_model import fetch_model
from kimi_mlx.cli.model_size import draft_shape
from kimi_mlx.cli.options import DiskCacheOptions, RunOptions
from kimi_mlx.cli.output import load_progress, print_note, print_warning
from kimi_mlx.cli.placement import choose_placement, print_placement
from kimi_mlx.cluster.doctor.wired_memory import find_lost_memory
from kimi_mlx.cluster.hosts.host import Cluster, local_cluster
from kimi_mlx.cluster.ring.watch import RingTimeouts
from kimi_mlx.model.config import load_config
from kimi_mlx.model.draft_config import load_draft_config
from kimi_mlx.planner.choice import Choice
from kimi_mlx.planner.drafts import DraftShape
from kimi_mlx.planner.expectation import Expectation
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.session import open as session_open
from kimi_mlx.session.model_status import ModelDeployment
from kimi_mlx.session.session import Session, SessionOptions
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.store.model_ref import ModelRef, resolve_draft_name
from kimi_mlx.units import format_count


@dataclass(frozen=True)
class LaunchContext:
    """A cluster that `kimi-mlx launch` has prepared for the command that it runs.

    Attributes:
        cluster: hosts of the ranks.
        option: option that named the hosts, for hints: `--hosts a,b`.
        restarts: maximum number of restarts of a lost ring.
        timeouts: timeouts of the ring.
        choice: placement of the model.
        doctor: report of the checks, for JSON.
    """

    cluster: Cluster
    option: str
    restarts: int
    timeouts: RingTimeouts
    choice: Choice
    doctor: Mapping[str, Any]

    @property
    def description(self) -> str:
        """Number of ranks and names of the hosts, for people."""
        return f"{format_count(self.cluster.size, 'rank')} on {', '.join(self.cluster.names)}"


@dataclass(frozen=True)
class PreparedModel:
    """A model with its placement and, on this machine, its files; ready to load.

    Attributes:
        target: the model; None for a synthetic one.
        name: name for messages.
        choice: placement of the model.
        folder: checkpoint or store on this machine; None on launched hosts, which each have their own.
        launch: launched hosts; None for this machine.
        draft: folder of the draft model on this machine; None without one, and on launched hosts.
        draft_name: name by which a launched host looks the draft model up; None without one, and on this machine.
    """

    target: ModelRef | None
    name: str
    choice: Choice
    folder: Path | None
    launch: LaunchContext | None = None
    draft: Path | None = None
    draft_name: str | None = None


@dataclass(frozen=True)
class OpenedModel:
    """A loaded model.

    Attributes:
        session: session that the caller closes.
        tokenizer_folder: folder with the configuration, tokenizer and chat template.
        deployment: the model and its hosts, for its status.
        expectation: what to expect of a model whose experts are partly on the SSD; None if all are in memory.
    """

    session: Session
    tokenizer_folder: Path
    deployment: ModelDeployment
    expectation: Expectation | None = None


def launch_context(context: typer.Context) -> LaunchContext | None:
    """Return the hosts that a command was launched on; None if it was typed alone."""
    return context.obj if isinstance(context.obj, LaunchContext) else None


def place_model(
    target: ModelRef | None,
    ranks: int,
    strategy: str | None,
    *,
    is_quiet: bool,
    cluster: Cluster | None = None,
    shape: ModelShape | None = None,
    dtype: str | None = None,
    draft: DraftShape | None = None,
) -> Choice:
    """Choose the placement of a model on ranks of this machine, and print it.

    Args:
        target: the model; None for a synthetic one.
        ranks: number of ranks.
        strategy: strategy of the user; None for the stored one, else the fastest by measurement.
        is_quiet: whether to print nothing.
        cluster: ranks to measure on; None for ranks over loopback.
        shape: dimensions of the model; None to look them up by its name.
        dtype: compute dtype; None for the default.
        draft: draft model; None without one.

    Raises:
        UsageError: the weights of the strategy are for another number of ranks.
    """
    calibrate = calibrate_on(cluster or local_cluster(ranks), is_quiet, dtype)
    choice = choose_placement(target, ranks, strategy, calibrate, shape, draft)
    print_placement(choice, f"{ranks} ranks", is_quiet or ranks == 1)
    return choice


def prepare_model(
    launch: LaunchContext | None,
    target: ModelRef,
    run: RunOptions,
    *,
    is_quiet: bool,
    cluster: Cluster | None = None,
) -> PreparedModel:
    """Choose the placement of a model and find its files and those of its draft model; missing ones are downloaded.

    Args:
        launch: launched hosts; None for this machine.
        target: the model.
        run: options of the user.
        is_quiet: whether to print neither progress nor notices.
        cluster: ranks on this machine, to measure on; None for ranks over loopback.

    Raises:
        UsageError: the model is large and there is no terminal to ask on, or the strategy does not fit `--ranks`.
        WeightsError: the model cannot be downloaded, or its store is broken or has another placement.
        ConfigError: the model is not supported, or the draft model is made for another one.
    """
    draft = None if run.used_draft is None else resolve_draft_name(run.used_draft, target)
    if launch is not None:
        draft_name = None if draft is None else name_for_hosts(draft)
        return PreparedModel(target, target.name, launch.choice, None, launch, draft_name=draft_name)
    shape = None
    if run.used_draft is not None and run.ranks > 1:
        shape = draft_shape(run.used_draft, target.name, is_assumed=True)
    choice = place_model(
        target, run.ranks, run.strategy, is_quiet=is_quiet, cluster=cluster, dtype=run.dtype, draft=shape
    )
    folder = fetch_model(target, run.ranks, choice.strategy, is_quiet)
    config = load_config(folder)  # before anything is loaded: an unsupported checkpoint gets an error that says so
    draft_folder = None if draft is None else fetch_model(draft, 1, "hybrid", is_quiet)
    if draft_folder is not None:
        load_draft_config(draft_folder).captured_layers(config)  # likewise
    return PreparedModel(target, target.name, choice, folder, draft=draft_folder)


def session_options(run: RunOptions, disk: DiskCacheOptions | None = None) -> SessionOptions:
    """Return the options of a session; open_session() adds the model and its placement.

    Args:
        run: options of the user.
        disk: options of the prompt cache on disk; None for none.

    Raises:
        UsageError: options that do not go together.
    """
    disk = disk or DiskCacheOptions()
    disk.check()
    return SessionOptions(
        None,
        dtype=run.dtype,
        speculate=run.speculate,
        check_every=run.check_every,
        fast_sync=run.fast_sync,
        cache_dir=disk.cache_dir,
        cache_disk_bytes=disk.cache_disk,
        cache_memory_bytes=run.cache_memory,
        expert_memory=ExpertMemory.parse(run.expert_memory),
    )


def open_session(model: PreparedModel, options: SessionOptions, ranks: int, is_quiet: bool) -> OpenedModel:
    """Load a model behind a progress bar. If some of its experts are on the SSD, print the number in memory.

    Args:
        model: the model, from prepare_model().
        options: options from session_options().
        ranks: number of ranks on this machine; ignored on launched hosts.
        is_quiet: whether to show no progress.

    Raises:
        MissingModelError: a launched host does not have the model.
        KimiMlxError: the model cannot be loaded, or a rank is lost.
    """
    opened = _open(model, options, ranks, is_quiet)
    if opened.expectation is not None and not is_quiet:
        print_note(describe_expectation(opened.expectation))
        if model.launch is None and (hint := limit_hint(opened.deployment)) is not None:
            print_note(hint)  # the checks of launched hosts have said so
    return opened


def _open(model: PreparedModel, options: SessionOptions, ranks: int, is_quiet: bool) -> OpenedModel:
    if model.launch is not None:
        return _open_on_hosts(model.launch, model, options, is_quiet)
    options = options_on_this_machine(model, options, ranks)
    if lost := find_lost_memory():
        print_warning(f"{lost.message}; {lost.remedy}")
    suffix = f" on {ranks} ranks" if ranks > 1 else ""
    with load_progress(f"loading {model.name}{suffix}", is_quiet) as progress:
        return _opened(session_open.open_session(options, progress), options.checkpoint, model, options)


def options_on_this_machine(model: PreparedModel, options: SessionOptions, ranks: int) -> SessionOptions:
    """Return the options of a session with the folder and the placement of a model on this machine."""
    return replace(options, folder=model.folder, ranks=ranks, strategy=model.choice.strategy, draft=model.draft)


def _open_on_hosts(launch: LaunchContext, model: PreparedModel, options: SessionOptions, is_quiet: bool) -> OpenedModel:
    """Load a model on launched hosts, with a progress bar per rank."""
    from kimi_mlx.session.ring import RingSession  # numpy: not for a model in this process

    assert model.target is not None
    options = replace(
        options,
        strategy=launch.choice.strategy,
        model=name_for_hosts(model.target),
        draft_name=model.draft_name,
        cluster=launch.cluster,
        max_restarts=launch.restarts,
        timeouts=launch.timeouts,
    )
    names = [
        f"{host.ssh}: loading {model.name}" + (f", rank {rank}" if len(launch.cluster.names) == 1 else "")
        for rank, host in enumerate(launch.cluster.hostfile.hosts)
    ]
    with load_progress(names, is_quiet) as progress:
        session = RingSession(options, progress)
        return _opened(session, session.tokenizer_folder, model, options)


def _opened(session: Session, folder: Path, model: PreparedModel, options: SessionOptions) -> OpenedModel:
    has_ranks = options.cluster is not None or options.ranks > 1
    cluster = options.effective_cluster if has_ranks else None
    config = load_config(folder)
    if model.launch is None or cluster is None:
        deployment = deployment_here(model.name, options.strategy, cluster, config)
    else:
        deployment = deployment_on_hosts(model.name, options.strategy, cluster, config, model.launch.doctor)
    return OpenedModel(session, folder, deployment, expectation_of(session, deployment, config))


def name_for_hosts(target: ModelRef) -> str:
    """Return the name that hosts look a model up by; for a folder its absolute path, which each host must have."""
    is_packaged = (target.entry is not None and target.entry.is_packaged) or target.draft is not None
    return target.name if target.folder is None or is_packaged else str(target.folder.resolve())

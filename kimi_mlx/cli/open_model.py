"""What `kimi-mlx launch` has prepared for the command that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import typer

from kimi_mlx.cli.output import load_progress
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.ring.watch import Limits
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.choice import Choice
from kimi_mlx.session.open import open_session
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import Session, SessionOptions
from kimi_mlx.store.locate import Target


@dataclass(frozen=True)
class LaunchContext:
    """A cluster that is ready.

    Args:
        cluster: where ranks run.
        option: how the hosts were named, for hints: `--hosts a,b`.
        restarts: how often a lost ring is started again.
        limits: how long things may take on it.
        choice: how the ranks share the model.
        doctor: what the checks have found, for JSON.
    """

    cluster: Cluster
    option: str
    restarts: int
    limits: Limits
    choice: Choice
    doctor: Mapping[str, Any]

    @property
    def where(self) -> str:
        """In words."""
        ranks = "1 rank" if self.cluster.size == 1 else f"{self.cluster.size} ranks"
        return f"{ranks} on {', '.join(self.cluster.names)}"


def launch_context(context: typer.Context) -> LaunchContext | None:
    """What a command was launched on; None if it was typed alone."""
    return context.obj if isinstance(context.obj, LaunchContext) else None


def name_for_hosts(target: Target) -> str:
    """What hosts call a model: its name; of a folder the whole path, which must be there on every host."""
    is_packaged = target.entry is not None and target.entry.is_packaged
    return target.name if target.folder is None or is_packaged else str(target.folder.resolve())


def refuse_ranks(ranks: int | None) -> None:
    """Refuse `--ranks` beside hosts."""
    if ranks not in (None, 1):
        raise UsageError("--ranks and hosts exclude each other: each host is a rank", hint="leave --ranks out")


def open_on_hosts(launched: LaunchContext, target: Target, wanted: SessionOptions, is_quiet: bool) -> RingSession:
    """Load a model on the cluster, behind a bar for each rank.

    Args:
        launched: the cluster.
        target: the model.
        wanted: how to run it; where and how it is shared comes from the cluster.
        is_quiet: without bars.

    Raises:
        MissingModelError: a host lacks it.
        KimiMlxError: it cannot be loaded, or a rank is lost.
    """
    options = replace(
        wanted,
        strategy=launched.choice.strategy,
        model=name_for_hosts(target),
        cluster=launched.cluster,
        max_restarts=launched.restarts,
        timeouts=launched.limits,
    )
    names = [
        f"loading {target.name} on {host.ssh}" + (f", rank {rank}" if len(launched.cluster.names) == 1 else "")
        for rank, host in enumerate(launched.cluster.hostfile.hosts)
    ]
    with load_progress(names, is_quiet) as progress:
        return RingSession(options, progress)


def open_on_this_machine(options: SessionOptions, name: str, is_quiet: bool) -> Session:
    """Load it behind a progress bar.

    Raises:
        KimiMlxError: it cannot be loaded.
    """
    where = f" on {options.ranks} ranks" if options.ranks > 1 else ""
    with load_progress(f"loading {name}{where}", is_quiet) as progress:
        return open_session(options, progress)

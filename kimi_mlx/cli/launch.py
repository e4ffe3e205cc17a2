"""`kimi-mlx launch`: check, prepare and start a cluster, then run a command on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from kimi_mlx.cli.host_options import EnvOption, HostOptions
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import ADVANCED, CLUSTER, FastSyncOption, refuse_mlx_launch
from kimi_mlx.cluster.hosts.hostfile_check import check_envs
from kimi_mlx.cluster.ring.watch import RingTimeouts
from kimi_mlx.errors import MissingModelError, UsageError


@dataclass(frozen=True)
class LaunchOptions:
    """Options of how ranks are prepared, started and watched."""

    env: EnvOption = None
    install: Annotated[
        bool,
        typer.Option(
            "--install",
            help="First install this version of kimi-mlx on hosts that do not have it.",
            rich_help_panel=CLUSTER,
        ),
    ] = False
    force: Annotated[bool, typer.Option("--force", help="Start even if a check fails.", rich_help_panel=ADVANCED)] = (
        False
    )
    restarts: Annotated[
        int,
        typer.Option("--restarts", min=0, help="Maximum number of attempts to reconnect.", rich_help_panel=ADVANCED),
    ] = 3
    limit: Annotated[
        float,
        typer.Option(
            "--limit",
            min=2,
            metavar="SECONDS",
            help="Timeout for a silent rank, and for one decode step.",
            rich_help_panel=ADVANCED,
        ),
    ] = RingTimeouts().silence_s
    fast_sync: FastSyncOption = False

    def check(self, hosts: HostOptions) -> None:
        """Check the options before any host is asked.

        Raises:
            UsageError: no hosts are given, or options exclude each other.
        """
        if hosts.hosts is None and hosts.hostfile is None:
            raise UsageError("launch needs hosts", hint="name them: `kimi-mlx launch --hosts mac-a.local,mac-b.local`")
        if self.install and hosts.python is not None:
            raise UsageError(
                "--install and --python exclude each other: --install creates its own Python environment",
                hint="leave one of them out",
            )
        check_envs(self.env or [], "`--env`")

    @property
    def timeouts(self) -> RingTimeouts:
        """Timeouts of the ring."""
        return RingTimeouts(silence_s=self.limit, step_s=self.limit)


@with_option_groups
def launch(
    context: typer.Context,
    hosts: HostOptions,
    options: LaunchOptions,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND",
            help="`chat` (the default), `serve`, `bench`, `check` or `download`, with its own arguments and options: "
            "see `kimi-mlx COMMAND --help`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check and connect several Macs, then run COMMAND."""
    refuse_mlx_launch()
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.launched_command import LaunchedCommand

    command = LaunchedCommand(context, words or [])  # first: `launch chat --help` needs no hosts
    options.check(hosts)
    from kimi_mlx.cli.launch_checks import confirm_download, prepare_launch

    launched = prepare_launch(hosts, options, command)
    try:
        command.run(launched)
    except MissingModelError as error:
        if command.name == "download" or not confirm_download(command.model, error):
            raise
        LaunchedCommand(context, ["download", command.model]).run(launched)
        command.run(launched)

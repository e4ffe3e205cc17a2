"""`kimi-mlx launch`: check, prepare and start a cluster, then run a command on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich.text import Text

from kimi_mlx.cli.chat import require_prompt
from kimi_mlx.cli.command_list import command_names
from kimi_mlx.cli.doctor_report import report, to_dict
from kimi_mlx.cli.host_options import HostOptions
from kimi_mlx.cli.open_model import LaunchContext, refuse_ranks
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import ADVANCED, CLUSTER, FastSyncOption, model_name, refuse_mlx_launch
from kimi_mlx.cli.output import print_json, slow_status, stderr
from kimi_mlx.cli.placement import choose_placement_on_hosts, print_placement, with_placement
from kimi_mlx.cli.stream import count
from kimi_mlx.cluster.doctor.doctor import Diagnosis, diagnose, with_model_need
from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest
from kimi_mlx.cluster.hosts.facts import own_interpreter
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.hosts.hostfile import write_hostfile
from kimi_mlx.cluster.hosts.hostfile_check import check_envs
from kimi_mlx.cluster.install.install import install as install_on
from kimi_mlx.cluster.install.install import needs_install
from kimi_mlx.cluster.ring.watch import RingTimeouts
from kimi_mlx.errors import MissingModelError, UsageError
from kimi_mlx.parallel.placement import normalize_strategy
from kimi_mlx.units import format_bytes

COMMANDS = ("chat", "serve", "bench", "check", "download")
"""Commands that can run on a cluster; the first is the default."""

IGNORED_BY_A_DOWNLOAD = ("stores", "memory", "wired memory", "wired limit")
"""Checks that do not prevent a download, which loads nothing."""


@dataclass(frozen=True)
class LaunchOptions:
    """Options of how ranks are prepared, started and watched."""

    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME=VALUE",
            help="Set an environment variable for every rank; repeatable.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None
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
        typer.Option(
            "--restarts", min=0, help="How many times to reconnect before giving up.", rich_help_panel=ADVANCED
        ),
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
            raise UsageError("launch needs hosts", hint="name them: `kimi-mlx launch --hosts mac-a,mac-b`")
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
    command = _Command(context, words or [])  # first: `launch chat --help` needs no hosts
    options.check(hosts)
    request, option = _question(hosts, options, command)
    need = request.need
    if command.name == "download" and need.repository is None:
        stderr.print(f"`{need.name}` comes with kimi-mlx; there is nothing to download", markup=False)
        return
    command.require_prompt()
    diagnosis = _diagnose(request, options.install)
    choice = choose_placement_on_hosts(diagnosis, request, command.strategy)
    need = with_placement(need, choice, request.world_size)
    diagnosis = with_model_need(diagnosis, replace(request, need=need), choice.strategy)
    cluster = _require_cluster(diagnosis, need, option, command, is_forced=options.force)
    if hosts.save is not None:
        write_hostfile(hosts.save, replace(cluster.hostfile, backend=cluster.backend))
        stderr.print(f"written: {hosts.save}", markup=False)
    if not command.is_json:
        _print_start(diagnosis, need, option, cluster, is_full=command.name == "check")
        print_placement(choice, count(cluster.size, "rank" if len(cluster.names) == 1 else "host"))
    launched = LaunchContext(cluster, option, options.restarts, options.timeouts, choice, to_dict(diagnosis, need))
    try:
        command.run(launched)
    except MissingModelError as error:
        if command.name == "download" or not _confirm_download(need, error):
            raise
        _Command(context, ["download", command.model]).run(launched)
        command.run(launched)


class _Command:
    """The command that runs on the cluster; its arguments are checked before anything is started.

    Args:
        context: Typer's context of `launch`.
        words: the command with its arguments; without a command it is a chat.
    """

    def __init__(self, context: typer.Context, words: Sequence[str]):
        self.name = words[0] if words and words[0] in COMMANDS else COMMANDS[0]
        assert context.parent is not None
        self._parent = context.parent
        group: Any = self._parent.command
        if words and words[0] not in COMMANDS and words[0] in command_names():
            names = ", ".join(f"`{name}`" for name in COMMANDS)
            raise UsageError(
                f"launch runs {names}, not `{words[0]}`", hint=f"type `kimi-mlx {words[0]}` without launch"
            )
        self._words = list(words[1:] if words and words[0] == self.name else words)
        self._command = group.get_command(self._parent, self.name)
        with self._context() as parsed:
            self._parameters: dict[str, Any] = dict(parsed.params)
        if self._parameters.get("model") in COMMANDS:
            name = self._parameters["model"]
            raise UsageError(f"`{words[0]}` is before `{name}`", hint=f"put the options of `{name}` after it")
        refuse_ranks(self._parameters.get("ranks"))
        if self._parameters.get("against") or self._parameters.get("synthetic"):
            raise UsageError("--against and --synthetic run on one machine only", hint="run bench without launch")

    @property
    def model(self) -> str:
        """Name of the model."""
        return model_name(self._parameters.get("model"))

    @property
    def strategy(self) -> str | None:
        """Value of its `--strategy`."""
        return self._parameters.get("strategy")

    def check_strategy(self, num_ranks: int) -> None:
        """Check that the weights of its `--strategy` are as many as the ranks.

        Raises:
            UsageError: they are not.
        """
        if self.strategy is not None:
            normalize_strategy(self.strategy, num_ranks)

    def require_prompt(self) -> None:
        """Check that a chat has a terminal, a pipe or a prompt.

        Raises:
            UsageError: it has none of them.
        """
        if self.name == "chat":
            require_prompt(self._parameters.get("prompt"))

    @property
    def is_json(self) -> bool:
        """Whether it prints JSON."""
        return bool(self._parameters.get("json"))

    @property
    def has_fast_sync(self) -> bool:
        """Whether `--fast-sync` is among its options."""
        return bool(self._parameters.get("fast_sync"))

    def run(self, launched: LaunchContext) -> None:
        """Run the command on the cluster."""
        with self._context() as context:
            context.obj = launched
            self._command.invoke(context)

    def _context(self) -> Any:
        return self._command.make_context(self.name, list(self._words), parent=self._parent)


def _question(hosts: HostOptions, options: LaunchOptions, command: _Command) -> tuple[DoctorRequest, str]:
    """Return what the checks are to find out, and the option that named the hosts."""
    from kimi_mlx.cli.memory_requirement import memory_requirement

    ranks, option = hosts.read()
    command.check_strategy(len(ranks.hosts))
    request = DoctorRequest(
        ranks.with_envs(options.env or []).with_fast_sync(options.fast_sync or command.has_fast_sync),
        memory_requirement(command.model),
        hosts.requested_backend,
        hosts.python,
        is_link_forced=hosts.force_link,
        is_quick=command.name != "check",
    )
    return request, option


def _diagnose(request: DoctorRequest, is_install: bool) -> Diagnosis:
    """Check the hosts; with is_install, install our version first on hosts that do not have it."""
    own = own_interpreter()
    with slow_status() as set_status:
        if is_install:
            before = diagnose(replace(request, is_quick=True), sys.executable, set_status)
            lacking = {host: facts for host, facts in before.facts.items() if needs_install(facts, own)}
            if lacking:
                install_on(lacking, own, set_status)
        return diagnose(request, sys.executable, set_status)


def _require_cluster(
    diagnosis: Diagnosis, need: ModelNeed, option: str, command: _Command, *, is_forced: bool
) -> Cluster:
    """Return the cluster of a diagnosis.

    Raises:
        typer.Exit: a check failed; the report has been printed.
    """
    ignored = IGNORED_BY_A_DOWNLOAD if command.name == "download" else ()
    findings = tuple(finding for finding in diagnosis.findings if finding.check not in ignored)
    cluster = diagnosis.cluster
    if cluster is not None and (is_forced or not any(finding.state == "problem" for finding in findings)):
        return cluster
    shown = replace(diagnosis, findings=findings)
    if command.is_json:
        print_json(to_dict(shown, need))
    else:
        _print_report(shown, need, option)
    raise typer.Exit(1)


def _print_start(diagnosis: Diagnosis, need: ModelNeed, option: str, cluster: Cluster, *, is_full: bool) -> None:
    """Print the whole report, or a line on ranks and network."""
    if is_full:
        _print_report(diagnosis, need, option)
    else:
        stderr.print(_heading(diagnosis, cluster), style="dim", markup=False)


def _print_report(diagnosis: Diagnosis, need: ModelNeed, option: str) -> None:
    for part in report(diagnosis, need, option, stderr.width):
        stderr.print(part, soft_wrap=isinstance(part, str), markup=False)


def _heading(diagnosis: Diagnosis, cluster: Cluster) -> str:
    names = ", ".join(cluster.names) + (", with fast synchronisation" if cluster.hostfile.has_fast_sync else "")
    text = f"{count(cluster.size, 'rank')} on {names}"
    if diagnosis.network is None:
        return text
    speeds = [f": {link.speed}" for link in diagnosis.links if link.network == diagnosis.network]
    return f"{text} over {diagnosis.network}{''.join(speeds)}"


def _confirm_download(need: ModelNeed, error: MissingModelError) -> bool:
    """Ask whether to download a model that the hosts do not have; False without a terminal."""
    if not (sys.stdin.isatty() and stderr.is_terminal):
        return False
    size = "" if need.weights_bytes is None else f", {format_bytes(need.weights_bytes)}"
    stderr.print(Text(error.message))
    return typer.confirm(f"Download {need.name}{size}? Each host gets its part.", default=False, err=True)

"""`kimi-mlx launch`: check, prepare and start a cluster, then run a command on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.text import Text

from kimi_mlx.cli.chat import require_prompt
from kimi_mlx.cli.command_list import command_names
from kimi_mlx.cli.doctor_report import report, to_dict
from kimi_mlx.cli.host_options import (
    BackendOption,
    ForceLinkOption,
    HostfileOption,
    PythonOption,
    SaveOption,
    check_python_option,
    read_hosts,
)
from kimi_mlx.cli.open_model import LaunchContext, refuse_ranks
from kimi_mlx.cli.options import FastSyncOption, refuse_mlx_launch
from kimi_mlx.cli.output import print_json, slow_status, stderr
from kimi_mlx.cli.placement import choose_placement_on_hosts, print_placement, with_placement
from kimi_mlx.cli.stream import count
from kimi_mlx.cluster.doctor.doctor import Diagnosis, examine, with_need
from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.doctor.run_checks import Question
from kimi_mlx.cluster.hosts.facts import own_interpreter
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.hosts.hostfile import write_hostfile
from kimi_mlx.cluster.hosts.hostfile_check import check_envs
from kimi_mlx.cluster.install.install import install as install_on
from kimi_mlx.cluster.install.install import needs_install
from kimi_mlx.cluster.ring.watch import Limits
from kimi_mlx.errors import MissingModelError, UsageError
from kimi_mlx.parallel.placement import normalize_strategy
from kimi_mlx.settings import Settings
from kimi_mlx.units import format_bytes

COMMANDS = ("chat", "serve", "bench", "check", "download")
"""What can be run on a cluster; the first is the default."""

BROUGHT_BY_A_DOWNLOAD = ("stores", "memory", "wired limit")
"""Checks that do not stand in the way of a download."""


def launch(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND",
            help="`chat` (the default), `serve`, `bench`, `check` or `download`, with its own arguments and options: "
            "`kimi-mlx COMMAND --help`.",
            show_default=False,
        ),
    ] = None,
    hosts: Annotated[
        str | None, typer.Option("--hosts", metavar="A,B", help="Names for ssh; each is a rank.", show_default=False)
    ] = None,
    hostfile: HostfileOption = None,
    backend: BackendOption = "auto",
    python: PythonOption = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="Set this variable for every rank; repeatable."),
    ] = None,
    fast_sync: FastSyncOption = False,
    save: SaveOption = None,
    install: Annotated[
        bool, typer.Option("--install", help="First install this version of kimi-mlx on hosts that do not have it.")
    ] = False,
    force_link: ForceLinkOption = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if a check fails.")] = False,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="How many times to reconnect before giving up.")
    ] = 3,
    limit: Annotated[
        float,
        typer.Option("--limit", min=2, metavar="SECONDS", help="Timeout for a silent rank, and for one decode step."),
    ] = Limits().silence_s,
) -> None:
    """Check and connect several Macs, then run COMMAND."""
    from kimi_mlx.cli.memory_requirement import memory_requirement

    refuse_mlx_launch()
    command = _Command(context, words or [])  # whose help needs no hosts
    if hosts is None and hostfile is None:
        raise UsageError("launch needs hosts", hint="name them: `kimi-mlx launch --hosts mac-a,mac-b`")
    check_python_option(python)
    if install and python is not None:
        raise UsageError("--install brings a Python of its own, --python names another", hint="leave one of them out")
    asked = None if backend == "auto" else backend
    ranks, option = read_hosts(hosts, hostfile, asked)
    command.check_strategy(len(ranks.hosts))
    need = memory_requirement(command.model)
    if command.name == "download" and need.repository is None:
        stderr.print(f"`{need.name}` comes with kimi-mlx: there is nothing to fetch", markup=False)
        return
    check_envs(env or [], "`--env`")
    ranks = ranks.with_envs(env or []).with_fast_sync(fast_sync or command.wants_fast_sync)
    question = Question(ranks, need, asked, python, is_link_forced=force_link, is_quick=command.name != "check")
    command.require_prompt()
    diagnosis = _prepare(question, install)
    choice = choose_placement_on_hosts(diagnosis, question, command.strategy)
    need = with_placement(need, choice, len(ranks.hosts))
    diagnosis = with_need(diagnosis, replace(question, need=need))
    cluster = _accept(diagnosis, need, option, command, is_forced=force)
    if save is not None:
        write_hostfile(save, replace(cluster.hostfile, backend=cluster.backend))
        stderr.print(f"written: {save}", markup=False)
    if command.name == "check" and not command.is_json:
        for part in report(diagnosis, need, option, stderr.width):
            stderr.print(part, soft_wrap=isinstance(part, str), markup=False)
    elif not command.is_json:
        stderr.print(_heading(diagnosis, cluster), style="dim", markup=False)
    print_placement(
        choice, count(cluster.size, "rank" if len(cluster.names) == 1 else "host"), is_quiet=command.is_json
    )
    limits = Limits(silence_s=limit, step_s=limit)
    launched = LaunchContext(cluster, option, restarts, limits, choice, to_dict(diagnosis, need))
    try:
        command.run(launched)
    except MissingModelError as error:
        if command.name == "download" or not _may_fetch(need, error):
            raise
        _Command(context, ["download", command.model]).run(launched)
        command.run(launched)


class _Command:
    """The command that is to run on the cluster; its arguments are checked before anything is started."""

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
        with self._context() as checked:
            self._parameters: dict[str, Any] = dict(checked.params)
        if self._parameters.get("model") in COMMANDS:
            first = self._parameters["model"]
            raise UsageError(f"`{words[0]}` stands before `{first}`", hint=f"options of `{first}` go behind it")
        refuse_ranks(self._parameters.get("ranks"))
        if self._parameters.get("against") or self._parameters.get("synthetic"):
            raise UsageError("--against and --synthetic measure on one machine", hint="leave out the hosts")

    @property
    def model(self) -> str:
        """Which one it is about."""
        return self._parameters.get("model") or Settings.from_environment().model

    @property
    def strategy(self) -> str | None:
        """How the ranks are to share it, if it says so."""
        return self._parameters.get("strategy")

    def check_strategy(self, ranks: int) -> None:
        """Whether weights are those of so many ranks."""
        if self.strategy is not None:
            normalize_strategy(self.strategy, ranks)

    def require_prompt(self) -> None:
        """A chat needs a terminal, a pipe or a prompt."""
        if self.name == "chat":
            require_prompt(self._parameters.get("prompt"))

    @property
    def is_json(self) -> bool:
        """Whether it prints for programs."""
        return bool(self._parameters.get("json"))

    @property
    def wants_fast_sync(self) -> bool:
        """Whether `--fast-sync` stands behind it."""
        return bool(self._parameters.get("fast_sync"))

    def run(self, launched: LaunchContext) -> None:
        """Run it."""
        with self._context() as context:
            context.obj = launched
            self._command.invoke(context)

    def _context(self) -> Any:
        return self._command.make_context(self.name, list(self._words), parent=self._parent)


def _prepare(question: Question, is_install: bool) -> Diagnosis:
    """Examine the hosts, after bringing them our version if that is wanted."""
    own = own_interpreter()
    with slow_status() as say:
        if is_install:
            first = examine(replace(question, is_quick=True), sys.executable, say)
            lacking = {host: facts for host, facts in first.facts.items() if needs_install(facts, own)}
            if lacking:
                install_on(lacking, own, say)
        return examine(question, sys.executable, say)


def _accept(diagnosis: Diagnosis, need: ModelNeed, option: str, command: _Command, *, is_forced: bool) -> Cluster:
    """The cluster that was found, unless something stands in the way; the report of that goes to stderr."""
    passed = BROUGHT_BY_A_DOWNLOAD if command.name == "download" else ()
    wrong = [each for each in diagnosis.findings if each.check not in passed]
    is_bad = any(each.state == "trouble" for each in wrong)
    cluster = diagnosis.cluster
    if (is_bad and not is_forced) or cluster is None:
        shown = replace(diagnosis, findings=tuple(wrong))
        if command.is_json:
            print_json(to_dict(shown, need))
            raise typer.Exit(1)
        for part in report(shown, need, option, stderr.width):
            stderr.print(part, soft_wrap=isinstance(part, str), markup=False)
        raise typer.Exit(1)
    return cluster


def _heading(diagnosis: Diagnosis, cluster: Cluster) -> str:
    names = ", ".join(cluster.names) + (", with the fast fence" if cluster.hostfile.has_fast_sync else "")
    if diagnosis.network is None:
        return f"{count(cluster.size, 'rank')} on {names}"
    measured = [str(link.measured) for link in diagnosis.links if link.network == diagnosis.network]
    return (
        f"{count(cluster.size, 'rank')} on {names} over {diagnosis.network}{''.join(f': {each}' for each in measured)}"
    )


def _may_fetch(need: ModelNeed, error: MissingModelError) -> bool:
    """Ask whether to fetch a model that the hosts lack."""
    if not (sys.stdin.isatty() and stderr.is_terminal):
        return False
    size = "" if need.weights_bytes is None else f", {format_bytes(need.weights_bytes)}"
    stderr.print(Text(error.message))
    return typer.confirm(f"Fetch {need.name}{size}, each host its part?", default=False, err=True)

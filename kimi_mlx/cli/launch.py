"""`kimi-mlx launch`: check, prepare and start a cluster, then run a command on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.text import Text

from kimi_mlx.cli.doctor_report import report
from kimi_mlx.cli.hosts_options import (
    BackendOption,
    ForceLinkOption,
    HostfileOption,
    HostsOption,
    PythonOption,
    SaveOption,
    check_python_option,
    hosts_of,
)
from kimi_mlx.cli.launched import Launched, refuse_ranks
from kimi_mlx.cli.options import refuse_launcher
from kimi_mlx.cli.output import slow_status, stderr
from kimi_mlx.cluster.doctor import Diagnosis, examine
from kimi_mlx.cluster.examination import Question
from kimi_mlx.cluster.facts import own_interpreter
from kimi_mlx.cluster.hostfile import write_hostfile
from kimi_mlx.cluster.hosts import Cluster, Hostfile
from kimi_mlx.cluster.install import install as install_on
from kimi_mlx.cluster.install import needs_install
from kimi_mlx.cluster.need import ModelNeed
from kimi_mlx.cluster.watch import Limits
from kimi_mlx.errors import MissingModelError, UsageError
from kimi_mlx.settings import Settings
from kimi_mlx.units import format_bytes

COMMANDS = ("chat", "bench", "check", "download")
"""What can be run on a cluster; the first is the default."""

BROUGHT_BY_A_DOWNLOAD = ("stores", "memory", "wired limit")
"""Checks that do not stand in the way of a download."""


def launch(
    context: typer.Context,
    hosts: HostsOption = None,
    hostfile: HostfileOption = None,
    backend: BackendOption = "auto",
    python: PythonOption = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="Set this for every rank; may be given again."),
    ] = None,
    save: SaveOption = None,
    install: Annotated[
        bool, typer.Option("--install", help="First bring this version of kimi-mlx to hosts that lack it.")
    ] = False,
    force_link: ForceLinkOption = False,
    force: Annotated[bool, typer.Option("--force", help="Start although a check says that it will not work.")] = False,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="How often a lost ring is started again before it is given up.")
    ] = 3,
    limit: Annotated[
        float,
        typer.Option("--limit", min=2, metavar="SECONDS", help="How long a rank may be silent, or a token take."),
    ] = Limits().silence_s,
) -> None:
    """Run a model on several Macs: check them, connect them, then COMMAND.

    COMMAND is `chat` (the default), `bench`, `check` or `download`, with its own arguments and options:
    `kimi-mlx COMMAND --help`.
    """
    from kimi_mlx.cli.need import need_of

    refuse_launcher()
    if hosts is None and hostfile is None:
        raise UsageError("launch needs hosts", hint="name them: `kimi-mlx launch --hosts mac-a,mac-b`")
    check_python_option(python)
    if install and python is not None:
        raise UsageError("--install brings a Python of its own, --python names another", hint="leave one of them out")
    command = _Command(context, context.args)
    asked = None if backend == "auto" else backend
    ranks, option = hosts_of(hosts, hostfile, asked)
    need = need_of(command.model)
    question = Question(
        _with_envs(ranks, env or []), need, asked, python, is_link_forced=force_link, is_quick=command.name != "check"
    )
    diagnosis = _prepare(question, install)
    cluster = _accept(diagnosis, need, option, is_forced=force, is_download=command.name == "download")
    if save is not None:
        write_hostfile(save, replace(cluster.hostfile, backend=cluster.backend))
        stderr.print(f"written: {save}", markup=False)
    if command.name == "check":
        for part in report(diagnosis, need, option, stderr.width):
            stderr.print(part, soft_wrap=isinstance(part, str), markup=False)
    elif not command.is_json:
        stderr.print(_heading(diagnosis, cluster), style="dim", markup=False)
    launched = Launched(cluster, option, restarts, Limits(silence_s=limit, step_s=limit))
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
        self._words = list(words[1:] if words and words[0] == self.name else words)
        assert context.parent is not None
        self._parent = context.parent
        group: Any = self._parent.command
        self._command = group.get_command(self._parent, self.name)
        with self._context() as checked:
            self._parameters: dict[str, Any] = dict(checked.params)
        refuse_ranks(self._parameters.get("ranks"))
        if self.model.startswith("-"):
            raise UsageError(f"`{self.model}` is neither a model nor an option of `{self.name}`")

    @property
    def model(self) -> str:
        """Which one it is about."""
        return self._parameters.get("model") or Settings.from_environment().model

    @property
    def is_json(self) -> bool:
        """Whether it prints for programs."""
        return bool(self._parameters.get("json"))

    def run(self, launched: Launched) -> None:
        """Run it."""
        with self._context() as context:
            context.obj = launched
            self._command.invoke(context)

    def _context(self) -> Any:
        return self._command.make_context(self.name, list(self._words), parent=self._parent)


def _with_envs(hostfile: Hostfile, envs: Sequence[str]) -> Hostfile:
    for each in envs:
        name, sign, _ = each.partition("=")
        if not sign or not name.isidentifier():
            raise UsageError(
                f"--env is `{each}`, not NAME=VALUE", hint="give for example `--env HF_ENDPOINT=https://...`"
            )
    return replace(hostfile, envs=(*hostfile.envs, *envs))


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


def _accept(diagnosis: Diagnosis, need: ModelNeed, option: str, *, is_forced: bool, is_download: bool) -> Cluster:
    """The cluster that was found, unless something stands in the way; the report of that goes to stderr."""
    # a download brings the stores that are missing
    wrong = [each for each in diagnosis.findings if not (is_download and each.check in BROUGHT_BY_A_DOWNLOAD)]
    is_bad = any(each.state == "trouble" for each in wrong)
    cluster = diagnosis.cluster
    if (is_bad and not is_forced) or cluster is None:
        shown = replace(diagnosis, findings=tuple(wrong))
        for part in report(shown, need, option, stderr.width):
            stderr.print(part, soft_wrap=isinstance(part, str), markup=False)
        raise typer.Exit(1)
    return cluster


def _heading(diagnosis: Diagnosis, cluster: Cluster) -> str:
    names = ", ".join(cluster.names)
    if diagnosis.network is None:
        return f"{cluster.size} ranks on {names} over {cluster.backend}"
    measured = [str(link.measured) for link in diagnosis.links if link.network == diagnosis.network]
    return f"{cluster.size} ranks on {names} over {diagnosis.network}{''.join(f': {each}' for each in measured)}"


def _may_fetch(need: ModelNeed, error: MissingModelError) -> bool:
    """Ask whether to fetch a model that the hosts lack."""
    if not (sys.stdin.isatty() and stderr.is_terminal):
        return False
    size = "" if need.weights_bytes is None else f", {format_bytes(need.weights_bytes)}"
    stderr.print(Text(error.message))
    return typer.confirm(f"Fetch {need.name}{size}, each host its part?", default=False, err=True)

"""`kimi-mlx doctor`: what is wrong with this Mac or this cluster, and the command that mends it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from kimi_mlx.cli.doctor_report import report, to_dict
from kimi_mlx.cli.options import JsonOption, ModelArgument
from kimi_mlx.cli.output import print_json, slow_status, stderr, stdout
from kimi_mlx.cluster.doctor import examine
from kimi_mlx.cluster.examination import Question
from kimi_mlx.cluster.hostfile import parse_hosts, read_hostfile, write_hostfile
from kimi_mlx.cluster.hostfile_check import check_hostfile
from kimi_mlx.cluster.hosts import Backend, Host, Hostfile
from kimi_mlx.errors import UsageError
from kimi_mlx.settings import Settings

BackendName = Literal["auto", "ring", "jaccl", "jaccl-ring"]


def doctor(
    model: ModelArgument = None,
    hosts: Annotated[
        str | None,
        typer.Option("--hosts", metavar="A,B", help="Names for ssh. Default: this machine alone.", show_default=False),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", metavar="FILE", help="Hosts and addresses in MLX's format.", show_default=False),
    ] = None,
    backend: Annotated[
        BackendName,
        typer.Option("--backend", help="TCP (`ring`) or RDMA. `auto`: the hostfile's, else RDMA where all are ready."),
    ] = "auto",
    python: Annotated[
        str | None,
        typer.Option(
            "--python",
            metavar="PATH",
            help="The interpreter on every host. Default: one with kimi-mlx.",
            show_default=False,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Write the addresses found as a hostfile.", show_default=False),
    ] = None,
    force_link: Annotated[bool, typer.Option("--force-link", help="Take a network that is too slow.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Without the self-test.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what is well, too.")] = False,
    json: JsonOption = False,
) -> None:
    """Say what is wrong with this Mac, or with a cluster, and the command that mends it."""
    from kimi_mlx.cli.need import need_of

    asked = None if backend == "auto" else backend
    ranks, option = _ranks(hosts, hostfile, asked)
    if save is not None and not option:
        raise UsageError("--save writes a hostfile, and there are no hosts", hint="name them: `--hosts a,b`")
    if python is not None and not Path(python).is_absolute():
        raise UsageError(f"--python is `{python}`, no absolute path", hint="give one such as `/opt/py/bin/python3`")
    need = need_of(model or Settings.from_environment().model)
    question = Question(
        ranks,
        need,
        backend=asked,
        python=python,
        is_link_forced=force_link,
        is_quick=quick,
    )
    with slow_status(is_quiet=json) as say:
        diagnosis = examine(question, sys.executable, say)
    is_saved = save is not None and diagnosis.hostfile is not None
    if save is not None and diagnosis.hostfile is not None:
        write_hostfile(save, diagnosis.hostfile)
        option = f"--hostfile {shlex.quote(str(save))}"
    if json:
        print_json(to_dict(diagnosis, need))
    else:
        for part in report(diagnosis, need, option, stdout.width, verbose):
            stdout.print(part, soft_wrap=isinstance(part, str), markup=False)
    if save is not None:
        stderr.print(f"written: {save}" if is_saved else f"not written: {save}, no network was found", markup=False)
    if diagnosis.has_trouble:
        raise typer.Exit(1)


def _ranks(hosts: str | None, hostfile: Path | None, backend: Backend | None) -> tuple[Hostfile, str]:
    """The ranks, and the option that named them; none for this machine alone."""
    if hosts is not None and hostfile is not None:
        raise UsageError("--hosts and --hostfile exclude each other", hint="leave one of them out")
    if hosts is not None:
        return Hostfile(tuple(Host(host.ssh) for host in parse_hosts(hosts))), f"--hosts {hosts}"
    if hostfile is None:
        return Hostfile((Host("localhost"),)), ""
    ranks = read_hostfile(hostfile)
    if backend is not None:
        check_hostfile(replace(ranks, backend=backend), f"`{hostfile}` with `--backend {backend}`")
    return ranks, f"--hostfile {shlex.quote(str(hostfile))}"

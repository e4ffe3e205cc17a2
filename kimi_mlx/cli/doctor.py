"""`kimi-mlx doctor`: what is wrong with this Mac or this cluster, and the command that mends it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from typing import Annotated

import typer

from kimi_mlx.cli.doctor_report import report, to_dict
from kimi_mlx.cli.host_options import (
    BackendOption,
    ForceLinkOption,
    HostfileOption,
    HostsOption,
    PythonOption,
    SaveOption,
    check_python_option,
    read_hosts,
)
from kimi_mlx.cli.options import FastSyncOption, JsonOption, ModelArgument
from kimi_mlx.cli.output import print_json, slow_status, stderr, stdout
from kimi_mlx.cli.placement import choose_placement_on_hosts, with_placement
from kimi_mlx.cluster.doctor.doctor import examine, with_need
from kimi_mlx.cluster.doctor.run_checks import Question
from kimi_mlx.cluster.hosts.hostfile import write_hostfile
from kimi_mlx.errors import UsageError
from kimi_mlx.settings import Settings


def doctor(
    model: ModelArgument = None,
    hosts: HostsOption = None,
    hostfile: HostfileOption = None,
    backend: BackendOption = "auto",
    python: PythonOption = None,
    save: SaveOption = None,
    force_link: ForceLinkOption = False,
    fast_sync: FastSyncOption = False,
    quick: Annotated[bool, typer.Option("--quick", help="Without the self-test.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what is well, too.")] = False,
    json: JsonOption = False,
) -> None:
    """Find problems of a Mac or cluster, and the fix."""
    from kimi_mlx.cli.memory_requirement import memory_requirement

    asked = None if backend == "auto" else backend
    ranks, option = read_hosts(hosts, hostfile, asked)
    if save is not None and not option:
        raise UsageError("--save writes a hostfile, and there are no hosts", hint="name them: `--hosts a,b`")
    check_python_option(python)
    need = memory_requirement(model or Settings.from_environment().model)
    question = Question(
        ranks.with_fast_sync(fast_sync),
        need,
        backend=asked,
        python=python,
        is_link_forced=force_link,
        is_quick=quick,
    )
    with slow_status(is_quiet=json) as say:
        diagnosis = examine(question, sys.executable, say)
    choice = choose_placement_on_hosts(diagnosis, question, None)
    need = with_placement(need, choice, question.world_size)
    diagnosis = with_need(diagnosis, replace(question, need=need))
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

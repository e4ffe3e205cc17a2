"""`kimi-mlx doctor`: find problems of a Mac or a cluster, and the command that fixes each."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from typing import Annotated

import typer

from kimi_mlx.cli.host_options import HostOptions
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import FastSyncOption, JsonOption, ModelArgument, model_name
from kimi_mlx.errors import UsageError


@with_option_groups
def doctor(
    hosts: HostOptions,
    model: ModelArgument = None,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the self-test.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show the checks that passed.")] = False,
    json: JsonOption = False,
    fast_sync: FastSyncOption = False,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help="Instead check the model on this machine's GPU: results against the CPU, times and memory. Takes "
            "minutes, and downloads nothing.",
        ),
    ] = False,
) -> None:
    """Find problems of a Mac or cluster, and the fix."""
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.doctor_json import to_dict
    from kimi_mlx.cli.doctor_report import report
    from kimi_mlx.cli.model_size import download_disk, memory_requirement
    from kimi_mlx.cli.output import print_json, slow_status, stderr, stdout
    from kimi_mlx.cli.placement import choose_placement_on_hosts, with_placement
    from kimi_mlx.cli.text_check import text_findings
    from kimi_mlx.cli.weights_check import weights_findings
    from kimi_mlx.cluster.doctor.doctor import diagnose, with_model_need
    from kimi_mlx.cluster.doctor.run_checks import DoctorRequest
    from kimi_mlx.cluster.hosts.hostfile import write_hostfile
    from kimi_mlx.cluster.hosts.ssh import is_local

    ranks, option = hosts.read()
    save = hosts.save
    if gpu:
        from kimi_mlx.cli.doctor_gpu import check_gpu

        if option or model is not None or save is not None or quick or verbose or fast_sync:
            raise UsageError(
                "--gpu checks this machine; its only other option is --json",
                hint="run `kimi-mlx doctor --gpu [--json]`, on each host",
            )
        check_gpu(json)
        return
    if save is not None and not option:
        raise UsageError("--save writes a hostfile, but no hosts are given", hint="name them: `--hosts a,b`")
    name = model_name(model)
    need = memory_requirement(name)
    request = DoctorRequest(
        ranks.with_fast_sync(fast_sync),
        need,
        backend=hosts.requested_backend,
        python=hosts.python,
        is_link_forced=hosts.force_link,
        is_quick=quick,
        option=option,
        download=None if option else download_disk(),
    )
    with slow_status(is_quiet=json) as set_status:
        diagnosis = diagnose(request, sys.executable, set_status)
        set_status("checking the model's files")
        own = next((host for host in diagnosis.hosts if is_local(host)), "this machine")
        file_findings = (*weights_findings(name, own), *text_findings(name, own))
    choice = choose_placement_on_hosts(diagnosis, request, None)
    need = with_placement(need, choice, request.world_size)
    diagnosis = with_model_need(diagnosis, replace(request, need=need), choice.strategy)
    diagnosis = replace(diagnosis, findings=(*diagnosis.findings, *file_findings))
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
        message = f"written: {save}" if is_saved else f"not written: {save}, because no network was found"
        stderr.print(message, markup=False)
    if diagnosis.has_problem:
        raise typer.Exit(1)

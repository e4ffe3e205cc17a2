"""Run the doctor's checks on this machine or on hosts, and print their report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from kimi_mlx.cli.doctor_json import to_dict
from kimi_mlx.cli.doctor_report import report
from kimi_mlx.cli.host_options import HostOptions
from kimi_mlx.cli.model_size import download_disk, draft_download_bytes, draft_shape, memory_requirement
from kimi_mlx.cli.output import hides_messages, print_json, slow_status, stderr, stdout
from kimi_mlx.cli.placement import choose_placement_on_hosts, with_placement
from kimi_mlx.cli.ssd_check import with_ssds
from kimi_mlx.cli.text_check import text_findings
from kimi_mlx.cli.weights_check import weights_findings
from kimi_mlx.cluster.doctor.doctor import Diagnosis, diagnose, with_model_need
from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest
from kimi_mlx.cluster.hosts.hostfile import write_hostfile
from kimi_mlx.cluster.hosts.ssh import is_local
from kimi_mlx.planner.drafts import DraftShape


def run_doctor(
    hosts: HostOptions,
    envs: Sequence[str],
    name: str,
    draft: str | None,
    *,
    quick: bool,
    verbose: bool,
    json: bool,
    fast_sync: bool,
) -> None:
    """Check hosts and a model, print the report, and save the hostfile if `--save` is given.

    Args:
        hosts: options that name the hosts.
        envs: environment variables `NAME=value` of every rank.
        name: name of the model.
        draft: value of `--draft`; None without a draft model.
        quick: whether to skip the self-test.
        verbose: whether to show the checks that passed.
        json: whether to print JSON.
        fast_sync: whether ranks would use the fast fence.

    Raises:
        typer.Exit: 1, a check found a problem.
        KimiMlxError: the hosts or the model cannot be checked.
    """
    ranks, option = hosts.read()
    with_draft = None if draft is None else draft_shape(draft, name)
    need = memory_requirement(name)
    if draft is not None:
        need = replace(need, draft_download_bytes=draft_download_bytes(draft, name))
    request = DoctorRequest(
        ranks.with_envs(envs).with_fast_sync(fast_sync),
        need,
        backend=hosts.requested_backend,
        python=hosts.python,
        is_link_forced=hosts.force_link,
        is_quick=quick,
        option=option,
        download=None if option else download_disk(),
    )
    diagnosis, need = _diagnose(request, name, with_draft, hides_messages(json))
    is_saved = hosts.save is not None and diagnosis.hostfile is not None
    if hosts.save is not None and diagnosis.hostfile is not None:
        write_hostfile(hosts.save, diagnosis.hostfile)
        option = f"--hostfile {shlex.quote(str(hosts.save))}"
    if json:
        print_json(to_dict(diagnosis, need))
    else:
        for part in report(diagnosis, need, option, stdout.width, verbose):
            stdout.print(part, soft_wrap=isinstance(part, str), markup=False)
    if hosts.save is not None:
        _report_save(hosts.save, is_saved)
    if diagnosis.has_problem:
        raise typer.Exit(1)


def _diagnose(
    request: DoctorRequest, name: str, draft: DraftShape | None, is_quiet: bool
) -> tuple[Diagnosis, ModelNeed]:
    """Return the result of all checks, and what the model needs with the placement that would be chosen."""
    with slow_status(is_quiet) as set_status:
        diagnosis = diagnose(request, sys.executable, set_status)
        set_status("checking the model's files")
        own = next((host for host in diagnosis.hosts if is_local(host)), "this machine")
        file_findings = (*weights_findings(name, own), *text_findings(name, own))
    choice = choose_placement_on_hosts(diagnosis, request, None, draft)
    need = with_placement(request.need, choice, request.world_size, draft)
    diagnosis = with_model_need(diagnosis, replace(request, need=need), choice.strategy)
    if not request.is_quick:
        with slow_status(is_quiet) as set_status:
            diagnosis = with_ssds(diagnosis, request, need, set_status)
    return replace(diagnosis, findings=(*diagnosis.findings, *file_findings)), need


def _report_save(file: Path, is_saved: bool) -> None:
    message = f"written: {file}" if is_saved else f"not written: {file}, because no network was found"
    stderr.print(message, markup=False)

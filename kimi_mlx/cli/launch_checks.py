"""The checks of `kimi-mlx launch`: diagnose the hosts, place the model, and print what is found."""

from __future__ import annotations

import sys
from dataclasses import replace

import typer
from rich.text import Text

from kimi_mlx.cli.calibration import calibrate_on
from kimi_mlx.cli.confirm import can_ask
from kimi_mlx.cli.doctor_json import to_dict
from kimi_mlx.cli.doctor_report import report
from kimi_mlx.cli.host_options import HostOptions
from kimi_mlx.cli.launch import LaunchOptions
from kimi_mlx.cli.launched_command import LaunchedCommand
from kimi_mlx.cli.local_server import servers_on
from kimi_mlx.cli.model_size import draft_shape, memory_requirement
from kimi_mlx.cli.open_model import LaunchContext
from kimi_mlx.cli.output import print_json, print_warning, slow_status, stderr
from kimi_mlx.cli.placement import choose_placement_on_hosts, print_placement, with_placement
from kimi_mlx.cluster.doctor.doctor import Diagnosis, diagnose, with_model_need
from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest
from kimi_mlx.cluster.hosts.facts import own_interpreter
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.hosts.hostfile import write_hostfile
from kimi_mlx.cluster.install.install import install as install_on
from kimi_mlx.cluster.install.install import needs_install
from kimi_mlx.errors import MissingModelError
from kimi_mlx.units import format_bytes, format_count

IGNORED_FOR_DOWNLOAD = ("stores", "memory", "wired memory", "wired limit")
"""Checks that do not prevent a download, which loads nothing."""

SHOWN_WARNINGS = ("encryption", "memory", "wired limit")
"""Checks whose warnings are shown before the ranks start: others may read their data, or experts do not fit."""


def prepare_launch(hosts: HostOptions, options: LaunchOptions, command: LaunchedCommand) -> LaunchContext:
    """Check the hosts and place the model.

    Args:
        hosts: hosts that the user named.
        options: options of `launch`.
        command: the command to run.

    Raises:
        KimiMlxError: wrong usage, or the model is not supported.
        typer.Exit: a check failed; the report has been printed.
    """
    request, option = _doctor_request(hosts, options, command)
    need = request.need
    command.check_chat()
    if command.name != "download":
        _report_servers(request)
    diagnosis = run_diagnosis(request, options.install)
    draft = None if command.draft is None else draft_shape(command.draft, command.model, is_assumed=True)
    calibrate = None if diagnosis.cluster is None else calibrate_on(diagnosis.cluster, command.is_json)
    experts = command.expert_memory
    choice = choose_placement_on_hosts(diagnosis, request, command.strategy, draft, calibrate, experts)
    need = with_placement(need, choice, request.world_size, draft, experts)
    diagnosis = with_model_need(diagnosis, replace(request, need=need), choice.strategy)
    cluster = _require_cluster(diagnosis, need, option, command, is_forced=options.force)
    if hosts.save is not None:
        write_hostfile(hosts.save, replace(cluster.hostfile, backend=cluster.backend))
        stderr.print(f"written: {hosts.save}", markup=False)
    if not command.is_json:
        _print_start(diagnosis, need, option, cluster, is_full=command.name == "check")
        print_placement(choice, format_count(cluster.size, "rank" if len(cluster.names) == 1 else "host"))
    return LaunchContext(cluster, option, options.restarts, options.timeouts, choice, to_dict(diagnosis, need))


def _report_servers(request: DoctorRequest) -> None:
    """Print which of this user's servers hold memory of the hosts."""
    for server in servers_on(request.hostfile.names):
        print_warning(
            f"{server.url} (process {server.pid}) has {server.model} in the memory of "
            f"{', '.join(server.hosts)}; `kimi-mlx chat --url {server.url}` chats with it"
        )


def _doctor_request(hosts: HostOptions, options: LaunchOptions, command: LaunchedCommand) -> tuple[DoctorRequest, str]:
    """Return the request of the checks, and the option that named the hosts."""
    ranks, option = hosts.read()
    command.check_strategy(len(ranks.hosts))
    request = DoctorRequest(
        ranks.with_envs(options.env or []).with_fast_sync(options.fast_sync or command.has_fast_sync),
        memory_requirement(command.model),
        hosts.requested_backend,
        hosts.python,
        is_link_forced=hosts.force_link,
        is_quick=command.name != "check",
        option=option,
    )
    return request, option


def run_diagnosis(request: DoctorRequest, is_install: bool) -> Diagnosis:
    """Check the hosts; with is_install, install our version first on hosts that do not have it."""
    own = own_interpreter()
    with slow_status() as set_status:
        if is_install:
            before = diagnose(replace(request, is_quick=True), sys.executable, set_status)
            targets = {host: facts for host, facts in before.facts.items() if needs_install(facts, own)}
            if targets:
                install_on(targets, own, set_status)
        return diagnose(request, sys.executable, set_status)


def _require_cluster(
    diagnosis: Diagnosis, need: ModelNeed, option: str, command: LaunchedCommand, *, is_forced: bool
) -> Cluster:
    """Return the cluster of a diagnosis.

    Raises:
        typer.Exit: a check failed; the report has been printed.
    """
    ignored = IGNORED_FOR_DOWNLOAD if command.name == "download" else ()
    findings = tuple(finding for finding in diagnosis.findings if finding.check not in ignored)
    cluster = diagnosis.cluster
    if cluster is not None and (is_forced or not any(finding.state == "problem" for finding in findings)):
        return cluster
    relevant = replace(diagnosis, findings=findings)
    if command.is_json:
        print_json(to_dict(relevant, need))
    else:
        _print_report(relevant, need, option)
    raise typer.Exit(1)


def _print_start(diagnosis: Diagnosis, need: ModelNeed, option: str, cluster: Cluster, *, is_full: bool) -> None:
    """Print the full report, or a line on ranks and network, and warnings that matter while the ranks run."""
    if is_full:
        _print_report(diagnosis, need, option)
        return
    stderr.print(_heading(diagnosis, cluster), style="dim", markup=False)
    for finding in diagnosis.findings:
        if finding.check in SHOWN_WARNINGS and finding.state == "warning":
            host = "" if finding.check == "encryption" else f"{finding.host}: "
            print_warning(f"{host}{finding.message}; {finding.remedy}")


def _print_report(diagnosis: Diagnosis, need: ModelNeed, option: str) -> None:
    for part in report(diagnosis, need, option, stderr.width, is_launch=True):
        stderr.print(part, soft_wrap=isinstance(part, str), markup=False)


def _heading(diagnosis: Diagnosis, cluster: Cluster) -> str:
    names = ", ".join(cluster.names) + (", with fast synchronisation" if cluster.hostfile.has_fast_sync else "")
    text = f"{format_count(cluster.size, 'rank')} on {names}"
    if diagnosis.network is None:
        return text
    speeds = [f": {link.speed}" for link in diagnosis.links if link.network == diagnosis.network]
    return f"{text} over {diagnosis.network}{''.join(speeds)}"


def confirm_download(name: str, error: MissingModelError) -> bool:
    """Ask whether to download a model that the hosts do not have; False without a terminal."""
    if not can_ask():
        return False
    size = memory_requirement(name).weights_bytes
    stderr.print(Text(error.message))
    about = "" if size is None else f", {format_bytes(size)}"
    return typer.confirm(f"Download {name}{about}? Each host gets its part.", default=False, err=True)

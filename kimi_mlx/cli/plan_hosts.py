"""Real hosts for `kimi-mlx plan`: chip and memory of each, and the network between them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from kimi_mlx.cli.host_options import read_hosts
from kimi_mlx.cli.model_size import memory_requirement
from kimi_mlx.cli.output import slow_status
from kimi_mlx.cluster.doctor.doctor import Diagnosis, diagnose
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest
from kimi_mlx.cluster.network.choose import choose_network
from kimi_mlx.cluster.network.topology import read_topology
from kimi_mlx.errors import LinkError, SshError
from kimi_mlx.planner.links import RDMA, LinkProfile, measured_link
from kimi_mlx.planner.machines import Machine, machine_of_host

ABOUT_LINKS = ("reachable", "python", "addresses", "link")
"""Checks whose findings explain why a network could not be measured."""


def diagnose_hosts(hostfile: Path, model: str, is_quiet: bool) -> Diagnosis:
    """Check the hosts without the self-test; the network is measured even if versions differ or memory is short.

    Args:
        hostfile: path of a hostfile.
        model: name of the model.
        is_quiet: whether to show no status on the terminal.
    """
    ranks, option = read_hosts(None, hostfile, None)
    request = DoctorRequest(ranks, memory_requirement(model), is_quick=True, option=option)
    with slow_status(is_quiet) as set_status:
        diagnosis = diagnose(request, sys.executable, set_status)
        if diagnosis.links or len(diagnosis.hosts) == 1 or diagnosis.pythons.keys() < set(diagnosis.hosts):
            return diagnosis
        topology = read_topology([*diagnosis.facts.values()])
        choice = choose_network(request.hostfile, diagnosis.pythons, topology, diagnosis.backend, set_status)
        findings = (*diagnosis.findings, *choice.findings)
        return replace(diagnosis, findings=findings, links=choice.links, network=choice.network)


def host_machines(diagnosis: Diagnosis) -> tuple[Machine, ...]:
    """Return the hosts as the planner's machines.

    Raises:
        SshError: a host did not answer.
        UsageError: a host is not a Mac that the planner knows.
    """
    for host in diagnosis.hosts:
        if host not in diagnosis.facts:
            raise SshError(
                f"`{host}` did not answer",
                hint="find out why with `kimi-mlx doctor`, or name the machines with `--machines`",
            )
    all_facts = [diagnosis.facts[host] for host in diagnosis.hosts]
    return tuple(
        machine_of_host(facts.host, facts.chip, facts.memory_bytes, facts.wired_limit_mb) for facts in all_facts
    )


def chosen_link(diagnosis: Diagnosis) -> LinkProfile | None:
    """Return the slowest measured link of the chosen network; None if there is none."""
    measured = [link.speed for link in diagnosis.links if link.speed and link.network == diagnosis.network]
    if not measured:
        return None
    slowest = max(measured, key=lambda link: link.round_trip_s)
    return measured_link(slowest.round_trip_s, slowest.bytes_per_s)


def measured_links(diagnosis: Diagnosis) -> list[LinkProfile]:
    """Return the measured network; with RDMA, which only the self-test measures, also its published speed.

    Raises:
        LinkError: no network was measured.
    """
    measured = chosen_link(diagnosis)
    if measured is None:
        problems = [
            finding.message
            for finding in diagnosis.findings
            if finding.state == "problem" and finding.check in ABOUT_LINKS
        ]
        raise LinkError(
            f"no network between the hosts could be measured{': ' if problems else ''}{'; '.join(problems)}",
            hint="run `kimi-mlx doctor` for details, or use published speeds: `--link tcp` or `--link rdma`",
        )
    return [RDMA, measured] if diagnosis.backend != "ring" else [measured]

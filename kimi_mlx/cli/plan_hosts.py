"""What `kimi-mlx plan` asks of real hosts: chip and memory of each, and the network between them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from kimi_mlx.cli.host_options import read_hosts
from kimi_mlx.cli.output import slow_status
from kimi_mlx.cluster.doctor.doctor import Diagnosis, examine
from kimi_mlx.cluster.doctor.run_checks import Question
from kimi_mlx.cluster.network.choose import join_hosts
from kimi_mlx.cluster.network.topology import topology
from kimi_mlx.errors import LinkError, SshError
from kimi_mlx.planner.links import RDMA, LinkProfile, measured_link
from kimi_mlx.planner.machines import Machine, machine_of_host

ABOUT_LINKS = ("reachable", "python", "addresses", "link")
"""Checks of the doctor that say why a network could not be measured."""


def diagnose_hosts(hostfile: Path, model: str, is_quiet: bool) -> Diagnosis:
    """What the doctor finds without its self-test; the network is measured even if versions differ, or memory is short.

    Args:
        hostfile: MLX's.
        model: that is to run there.
        is_quiet: without words on the terminal.
    """
    from kimi_mlx.cli.memory_requirement import memory_requirement

    ranks, _ = read_hosts(None, hostfile, None)
    question = Question(ranks, memory_requirement(model), is_quick=True)
    with slow_status(is_quiet) as say:
        found = examine(question, sys.executable, say)
        if found.links or len(found.hosts) == 1 or found.pythons.keys() < set(found.hosts):
            return found
        joined = join_hosts(question, found.pythons, topology([*found.facts.values()]), found.backend, say)
        findings = (*found.findings, *joined.findings)
        return replace(found, findings=findings, links=joined.links, network=joined.network)


def host_machines(diagnosis: Diagnosis) -> tuple[Machine, ...]:
    """The hosts as machines.

    Raises:
        SshError: one did not answer.
        UsageError: one is no Mac that the planner knows.
    """
    for host in diagnosis.hosts:
        if host not in diagnosis.facts:
            raise SshError(f"`{host}` did not answer", hint="`kimi-mlx doctor` says why; or name the `--machines`")
    known = [diagnosis.facts[host] for host in diagnosis.hosts]
    return tuple(machine_of_host(each.host, each.chip, each.memory_bytes, each.wired_limit_mb) for each in known)


def chosen_link(diagnosis: Diagnosis) -> LinkProfile | None:
    """The network that was measured and chosen, if there is one."""
    measured = [link.measured for link in diagnosis.links if link.measured and link.network == diagnosis.network]
    if not measured:
        return None
    slowest = max(measured, key=lambda each: each.round_trip_s)
    return measured_link(slowest.round_trip_s, slowest.bytes_per_s)


def measured_links(diagnosis: Diagnosis) -> list[LinkProfile]:
    """The network that was measured; with RDMA, whose speed only the self-test would tell, the published one, too.

    Raises:
        LinkError: there is none.
    """
    measured = chosen_link(diagnosis)
    if measured is None:
        trouble = [each.message for each in diagnosis.findings if each.state == "trouble" and each.check in ABOUT_LINKS]
        raise LinkError(
            f"no network between the hosts could be measured{': ' if trouble else ''}{'; '.join(trouble)}",
            hint="`kimi-mlx doctor` says more; `--link tcp` and `--link rdma` take published figures",
        )
    return [RDMA, measured] if diagnosis.backend != "ring" else [measured]

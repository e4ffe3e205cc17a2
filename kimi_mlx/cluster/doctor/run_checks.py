"""All checks of the doctor that need nothing but facts. Pure: facts in, findings out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

from kimi_mlx.cluster.doctor.cluster_checks import (
    check_distinct,
    check_front,
    check_macos,
    check_stores,
    check_versions,
)
from kimi_mlx.cluster.doctor.host_checks import (
    check_chip,
    check_clock,
    check_complete,
    check_disk,
    check_fast_sync,
    check_firewall,
    check_memory,
    check_python,
    check_reachable,
    check_wired_limit,
)
from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.hosts.facts import Facts, parse_facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import Backend, Hostfile
from kimi_mlx.cluster.hosts.ssh import ScriptResult, is_local
from kimi_mlx.cluster.network.topology import Topology, check_topology
from kimi_mlx.errors import SshError
from kimi_mlx.units import format_bytes


@dataclass(frozen=True)
class DoctorRequest:
    """What is to be examined.

    Args:
        hostfile: the ranks; without addresses if they are to be found.
        need: of the model.
        backend: how the ranks are to talk; None for the hostfile's, or what suits.
        python: the interpreter on every host; None for any that fits.
        is_link_forced: a slow network will do.
        is_quick: without the self-test.
    """

    hostfile: Hostfile
    need: ModelNeed
    backend: Backend | None = None
    python: str | None = None
    is_link_forced: bool = False
    is_quick: bool = False

    @property
    def names(self) -> list[str]:
        """The hosts, each once."""
        return list(self.ranks)

    @property
    def ranks(self) -> dict[str, list[int]]:
        """Host -> its ranks."""
        ranks: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hostfile.hosts):
            ranks.setdefault(host.ssh, []).append(rank)
        return ranks

    @property
    def world_size(self) -> int:
        """How many ranks."""
        return len(self.hostfile.hosts)

    @property
    def is_alone(self) -> bool:
        """Whether it is about this machine only."""
        return len(self.ranks) == 1 and is_local(self.names[0])


def parse_host_facts(answers: Mapping[str, ScriptResult]) -> tuple[dict[str, Facts], list[Finding]]:
    """The facts of the hosts that answered, and whether each one did."""
    known: dict[str, Facts] = {}
    findings: list[Finding] = []
    for host, answer in answers.items():
        finding = check_reachable(answer)
        if finding.state == "ok":
            try:
                known[host] = parse_facts(host, answer.stdout)
            except SshError as error:
                finding = Finding(host, "reachable", "problem", error.message, error.hint)
        findings.append(finding)
    return known, findings


def check_hosts(
    request: DoctorRequest, known: Mapping[str, Facts], answers: Mapping[str, ScriptResult]
) -> list[Finding]:
    """Check each host on its own."""
    findings: list[Finding] = []
    for host, facts in known.items():
        if not facts.is_complete:
            findings.append(check_complete(facts))
        findings += [
            check_python(facts, request.python),
            check_chip(facts),
            *_check_room(request, facts),
        ]
        if not request.is_alone:
            findings.append(check_clock(facts, answers[host]))
            findings += [check_firewall(facts)] if facts.is_mac else []
    return findings


def _check_room(request: DoctorRequest, facts: Facts) -> list[Finding]:
    """Whether a host has the memory and the disk that the model needs there."""
    ranks, size = request.ranks[facts.host], request.world_size
    memory = request.need.memory_bytes(facts, ranks, size)
    return [
        check_memory(facts, memory),
        *([check_wired_limit(facts, memory)] if facts.is_mac else []),
        check_disk(facts, 0 if request.is_alone else request.need.disk_bytes(facts, ranks, size)),
    ]


def replace_model_findings(
    request: DoctorRequest, known: Mapping[str, Facts], findings: Sequence[Finding]
) -> list[Finding]:
    """Return the findings, with those that depend on the model's needs checked again."""
    again = [each for facts in known.values() for each in _check_room(request, facts)]
    again += _check_stores(request, [*known.values()])
    found = {(each.host, each.check): each for each in again}
    return [found.get((each.host, each.check), each) for each in findings]


def _check_stores(request: DoctorRequest, hosts: Sequence[Facts]) -> list[Finding]:
    need = request.need
    if need.repository is None or request.is_alone:
        return []
    return check_stores(hosts, need.repository, request.ranks, prefix=need.store_prefix)


def check_cluster(
    request: DoctorRequest, known: Mapping[str, Facts], front: Facts | None, topology: Topology, backend: Backend
) -> list[Finding]:
    """What must fit together: versions, systems, stores, addresses, RDMA.

    Args:
        request: what is examined.
        known: the facts of the hosts that answered.
        front: of this machine, if it is none of the hosts.
        topology: how the hosts are connected.
        backend: how the ranks are to talk.
    """
    hosts, need = [*known.values()], request.need
    fence = check_fast_sync(", ".join(request.names), request.hostfile.has_fast_sync)
    if request.is_alone:
        return [_check_model(request.names[0], need), fence]
    findings = check_distinct(hosts, _addresses(topology))
    versions = check_versions(hosts)
    if front is not None and all(finding.state == "ok" for finding in versions):
        versions = check_front(front, hosts) or versions
    findings += [*versions, *check_macos(hosts, backend != "ring")]
    findings += _check_stores(request, hosts)
    return [*findings, *check_topology(request.hostfile, hosts, backend, topology), fence]


def _addresses(topology: Topology) -> dict[str, list[str]]:
    return {
        host: [str(a.ip) for each in interfaces for a in each.addresses if not ip_address(a.ip).is_loopback]
        for host, interfaces in topology.interfaces.items()
    }


def _check_model(host: str, need: ModelNeed) -> Finding:
    if need.is_here:
        where = "comes with kimi-mlx" if need.repository is None else "is on this machine"
        return Finding(host, "model", "ok", f"`{need.name}` {where}")
    size = "" if need.weights_bytes is None else f" ({format_bytes(need.weights_bytes)})"
    message = f"`{need.name}`{size} is not on this machine yet"
    return Finding(host, "model", "warning", message, f"`kimi-mlx download {need.name}`")


def fill_in_hosts(findings: Sequence[Finding], hosts: Sequence[str]) -> list[Finding]:
    """Remedies that say `--hosts ...` with the hosts in it, so that their commands can be typed as they are."""
    option = f"--hosts {','.join(hosts)}"
    return [
        finding if finding.remedy is None else replace(finding, remedy=finding.remedy.replace("--hosts ...", option))
        for finding in findings
    ]


def clear_firewall_warnings(findings: Sequence[Finding]) -> list[Finding]:
    """After a self-test that went well: a firewall that might be in the way is not."""
    return [
        replace(finding, state="ok", message="it is on, and lets ranks connect", remedy=None)
        if (finding.check, finding.state) == ("firewall", "warning")
        else finding
        for finding in findings
    ]

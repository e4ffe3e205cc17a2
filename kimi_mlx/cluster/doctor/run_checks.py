"""Run all checks of the doctor that need only facts. Pure functions from facts to findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

from kimi_mlx.cluster.doctor.cluster_checks import (
    check_distinct,
    check_front,
    check_kernels,
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
from kimi_mlx.cluster.doctor.memory_need import DiskSpace, ModelNeed
from kimi_mlx.cluster.doctor.wired_memory import check_wired_memory
from kimi_mlx.cluster.hosts.facts import Facts, parse_facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import Backend, Hostfile
from kimi_mlx.cluster.hosts.ssh import ScriptResult, is_local
from kimi_mlx.cluster.network.topology import Topology, check_topology
from kimi_mlx.units import format_bytes


@dataclass(frozen=True)
class DoctorRequest:
    """Hosts and model to check.

    Args:
        hostfile: hosts of the ranks; without addresses, networks are discovered.
        need: memory and disk needs of the model.
        backend: backend of the ranks; None for the hostfile's, or the best that works.
        python: path of the interpreter on every host; None to search for one.
        is_link_forced: accept a network that is too slow.
        is_quick: skip the self-test.
        option: option that names the hosts, for commands in remedies; empty for this machine without launch.
        download: disk of a download without stores; None if the hosts write stores.
    """

    hostfile: Hostfile
    need: ModelNeed
    backend: Backend | None = None
    python: str | None = None
    is_link_forced: bool = False
    is_quick: bool = False
    option: str = ""
    download: DiskSpace | None = None

    @property
    def names(self) -> list[str]:
        """Names of the hosts, without duplicates."""
        return list(self.ranks)

    @property
    def ranks(self) -> dict[str, list[int]]:
        """Mapping from host to its ranks."""
        ranks: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hostfile.hosts):
            ranks.setdefault(host.ssh, []).append(rank)
        return ranks

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.hostfile.hosts)

    @property
    def is_alone(self) -> bool:
        """Whether this machine is the only host."""
        return len(self.ranks) == 1 and is_local(self.names[0])


def parse_host_facts(results: Mapping[str, ScriptResult]) -> tuple[dict[str, Facts], list[Finding]]:
    """Return the facts of the hosts that answered, and a finding `reachable` for every host."""
    facts_by_host: dict[str, Facts] = {}
    findings: list[Finding] = []
    for host, result in results.items():
        if result.is_ok:
            facts_by_host[host] = parse_facts(host, result.stdout)
        findings.append(check_reachable(result))
    return facts_by_host, findings


def check_hosts(
    request: DoctorRequest, facts_by_host: Mapping[str, Facts], results: Mapping[str, ScriptResult]
) -> list[Finding]:
    """Check each host by itself."""
    findings: list[Finding] = []
    for host, facts in facts_by_host.items():
        if not facts.is_complete:
            findings.append(check_complete(facts))
        findings += [
            check_python(facts, request.python),
            check_chip(facts),
            *([check_wired_memory(facts)] if facts.is_mac else []),
            *_check_capacity(request, facts),
        ]
        if not request.is_alone:
            findings.append(check_clock(facts, results[host]))
            findings += [check_firewall(facts)] if facts.is_mac else []
    return findings


def _check_capacity(request: DoctorRequest, facts: Facts) -> list[Finding]:
    """Check that a host has the memory and the disk space that the model needs there."""
    ranks, world_size = request.ranks[facts.host], request.world_size
    memory = request.need.memory(facts, ranks, world_size)
    return [
        check_memory(facts, memory, request.need.weights_bytes),
        *([check_wired_limit(facts, memory, request.need.weights_bytes)] if facts.is_mac else []),
        check_disk(facts, _disk_bytes(request, facts), request.download),
    ]


def _disk_bytes(request: DoctorRequest, facts: Facts) -> int | None:
    """Return the bytes that a host has yet to store: a download on this machine alone, else its part of the stores."""
    need, ranks = request.need, request.ranks[facts.host]
    if not request.is_alone or (request.option and not need.is_here):
        missing = need.disk_bytes(facts, ranks, request.world_size)
    else:
        missing = 0 if need.is_here else need.download_bytes
    return missing if missing is None or 0 not in ranks else missing + need.draft_download_bytes


def replace_model_findings(
    request: DoctorRequest, facts_by_host: Mapping[str, Facts], findings: Sequence[Finding], strategy: str
) -> list[Finding]:
    """Return the findings, with those that depend on the model's needs or the strategy checked again."""
    new_findings = [finding for facts in facts_by_host.values() for finding in _check_capacity(request, facts)]
    new_findings += [
        *_check_stores(request, [*facts_by_host.values()]),
        check_kernels([*facts_by_host.values()], strategy),
    ]
    by_check = {(finding.host, finding.check): finding for finding in new_findings}
    return [by_check.get((finding.host, finding.check), finding) for finding in findings]


def _check_stores(request: DoctorRequest, hosts: Sequence[Facts]) -> list[Finding]:
    need = request.need
    if need.repository is None or request.is_alone:
        return []
    return check_stores(hosts, need.repository, request.ranks, prefix=need.store_prefix)


def check_cluster(
    request: DoctorRequest,
    facts_by_host: Mapping[str, Facts],
    front: Facts | None,
    topology: Topology,
    backend: Backend,
) -> list[Finding]:
    """Check that the hosts match: versions, systems, stores, addresses and RDMA.

    Args:
        request: hosts and model to check.
        facts_by_host: facts of the hosts that answered.
        front: facts of this machine; None if it is one of the hosts.
        topology: how the hosts are connected.
        backend: backend of the ranks.
    """
    hosts, need = [*facts_by_host.values()], request.need
    names = ", ".join(facts_by_host)
    fast_sync = [check_fast_sync(names, request.hostfile.has_fast_sync)] if names else []
    if request.is_alone:
        return [_check_model(request.names[0], need, request.option), *fast_sync]
    findings = check_distinct(hosts, _addresses(topology))
    versions = check_versions(hosts)
    if front is not None and all(finding.state == "ok" for finding in versions):
        versions = check_front(front, hosts) or versions
    findings += [*versions, *check_macos(hosts, backend != "ring")]
    findings += [check_kernels(hosts)] if len(hosts) > 1 else []
    findings += _check_stores(request, hosts)
    return [*findings, *check_topology(request.hostfile, hosts, backend, topology), *fast_sync]


def _addresses(topology: Topology) -> dict[str, list[str]]:
    return {
        host: [
            str(address.ip)
            for interface in interfaces
            for address in interface.addresses
            if not ip_address(address.ip).is_loopback
        ]
        for host, interfaces in topology.interfaces.items()
    }


def _check_model(host: str, need: ModelNeed, option: str) -> Finding:
    if need.is_here:
        origin = "comes with kimi-mlx" if need.repository is None else "is on this machine"
        return Finding(host, "model", "ok", f"`{need.name}` {origin}")
    size = "" if need.download_bytes is None else f" ({format_bytes(need.download_bytes)})"
    message = f"`{need.name}`{size} is not on this machine yet"
    launch = f"launch {option} " if option else ""
    return Finding(host, "model", "warning", message, f"`kimi-mlx {launch}download {need.name}`")


def fill_in_hosts(findings: Sequence[Finding], request: DoctorRequest) -> list[Finding]:
    """Complete the commands in remedies, so that they can be copied as they are.

    `--hosts ...` becomes the user's option. `--hosts HOSTS` becomes the hosts by name even if the user gave a hostfile,
    because its addresses may be what is wrong.
    """
    by_name = f"--hosts {','.join(request.names)}"
    option = request.option or by_name
    return [
        replace(
            finding,
            remedy=finding.remedy and finding.remedy.replace("--hosts ...", option).replace("--hosts HOSTS", by_name),
        )
        for finding in findings
    ]


def clear_firewall_warnings(findings: Sequence[Finding]) -> list[Finding]:
    """Turn warnings about the firewall into ok. A self-test that passed shows that ranks can connect."""
    return [
        replace(finding, state="ok", message="on, but ranks can connect", remedy=None)
        if (finding.check, finding.state) == ("firewall", "warning")
        else finding
        for finding in findings
    ]

"""Diagnose this machine or a cluster: gather facts, check them, measure the network, run the self-test.

Never imports MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kimi_mlx.cluster.doctor.payloads import all_payloads
from kimi_mlx.cluster.doctor.run_checks import (
    DoctorRequest,
    check_cluster,
    check_hosts,
    clear_firewall_warnings,
    fill_in_hosts,
    parse_host_facts,
    replace_model_findings,
)
from kimi_mlx.cluster.doctor.self_test import SelfTest, self_test
from kimi_mlx.cluster.hosts.facts import FACTS_LIMIT_S, Facts, facts_script, own_interpreter
from kimi_mlx.cluster.hosts.findings import Finding, has_problem
from kimi_mlx.cluster.hosts.host import Backend, Cluster, Hostfile
from kimi_mlx.cluster.hosts.ssh import is_local, run_everywhere
from kimi_mlx.cluster.install.install import prefer_matching
from kimi_mlx.cluster.network.choose import choose_network
from kimi_mlx.cluster.network.links import Network
from kimi_mlx.cluster.network.measure_networks import Link, measure_network
from kimi_mlx.cluster.network.topology import choose_backend, read_topology
from kimi_mlx.sizing.ssd import SsdSpeed

DEAD_LINK_LIMIT_S = 3.0
"""Time limit per pair of hosts when looking for the link on which a self-test hung."""

BLOCKING = frozenset(
    {"reachable", "python", "versions", "host", "addresses", "devices", "cables", "RDMA", "bridge", "link"}
)
"""Checks that must pass before a self-test makes sense."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of the doctor.

    Args:
        hosts: names of the hosts, without duplicates.
        facts: facts of the hosts that answered.
        findings: results of all checks.
        links: measured networks.
        network: chosen network; None if none works or none is needed.
        backend: backend that the ranks would use.
        hostfile: hostfile for a launch; None if no network was chosen or given.
        self_test: result of the self-test; None if it was not run.
        ssds: measured speeds of SSDs, by host.
    """

    hosts: tuple[str, ...]
    facts: Mapping[str, Facts]
    findings: tuple[Finding, ...]
    links: tuple[Link, ...] = ()
    network: Network | None = None
    backend: Backend = "ring"
    hostfile: Hostfile | None = None
    self_test: SelfTest | None = None
    ssds: Mapping[str, SsdSpeed] = field(default_factory=dict[str, SsdSpeed])

    @property
    def has_problem(self) -> bool:
        """Whether any check found a problem."""
        return has_problem(self.findings)

    @property
    def pythons(self) -> dict[str, str]:
        """Host -> path of its interpreter, for hosts that have one."""
        return {host: facts.python.path for host, facts in self.facts.items() if facts.python is not None}

    @property
    def cluster(self) -> Cluster | None:
        """The cluster for a launch; None if a host lacks Python, or cannot be reached."""
        is_complete = self.hostfile is not None and self.pythons.keys() >= set(self.hosts)
        return Cluster(self.hostfile, self.backend, self.pythons) if self.hostfile and is_complete else None


def diagnose(request: DoctorRequest, own_python: str, report: Callable[[str], None] = lambda text: None) -> Diagnosis:
    """Gather facts, check them, measure the network and run the self-test.

    Args:
        request: hosts and model to check.
        own_python: path of this machine's interpreter; it is tried on the hosts too.
        report: callback for progress messages.

    Raises:
        UsageError: a host name is not valid for ssh.
    """
    diagnosis = _diagnose(request, own_python, report)
    return replace(diagnosis, findings=tuple(fill_in_hosts(diagnosis.findings, request)))


def with_model_need(diagnosis: Diagnosis, request: DoctorRequest, strategy: str) -> Diagnosis:
    """Repeat the checks of memory, disk, stores and kernels for the strategy that was chosen after `diagnose`."""
    findings = replace_model_findings(request, diagnosis.facts, diagnosis.findings, strategy)
    return replace(diagnosis, findings=tuple(fill_in_hosts(findings, request)))


def _diagnose(request: DoctorRequest, own_python: str, report: Callable[[str], None]) -> Diagnosis:
    facts_by_host, front, findings = _gather_facts(request, own_python, report)
    topology = read_topology([*facts_by_host.values()])
    backend = choose_backend(request.backend or request.hostfile.backend, [*facts_by_host.values()], topology)
    findings += check_cluster(request, facts_by_host, front, topology, backend)
    diagnosis = Diagnosis(tuple(request.names), facts_by_host, tuple(findings), backend=backend)
    if len(facts_by_host) < len(request.names) or any(facts.python is None for facts in facts_by_host.values()):
        return _without_test(request, diagnosis)
    if len(request.names) == 1:
        diagnosis = replace(diagnosis, hostfile=request.hostfile)
    elif not _is_blocked(diagnosis):  # do not measure wrong addresses
        choice = choose_network(
            request.hostfile,
            diagnosis.pythons,
            topology,
            backend,
            report,
            is_link_forced=request.is_link_forced,
        )
        diagnosis = replace(
            diagnosis,
            findings=(*diagnosis.findings, *choice.findings),
            links=choice.links,
            network=choice.network,
            hostfile=choice.hostfile,
        )
    return _test(request, diagnosis, report)


def _gather_facts(
    request: DoctorRequest, own_python: str, report: Callable[[str], None]
) -> tuple[dict[str, Facts], Facts | None, list[Finding]]:
    """Run one script on every host.

    Returns:
        Facts by host, facts of this machine if it is not one of the hosts, and the findings about single hosts.
    """
    names = request.names
    report("checking this machine" if request.is_alone else f"contacting {', '.join(names)}")
    envs = request.hostfile.envs
    script = facts_script([request.python or own_python], envs=envs, is_search=request.python is None)
    front_name = None if any(map(is_local, names)) else "localhost"
    every_name = [*names, *([front_name] if front_name else [])]

    def report_waiting(hosts: Sequence[str]) -> None:
        if hosts:
            report(f"waiting for {', '.join(hosts)} (at most {FACTS_LIMIT_S:.0f} s)")

    results = run_everywhere(every_name, script, FACTS_LIMIT_S, report_waiting)
    facts_by_host, reachable = parse_host_facts(results)
    facts_by_host = {host: prefer_matching(facts, own_interpreter()) for host, facts in facts_by_host.items()}
    front = facts_by_host.pop(front_name, None) if front_name else None
    reachable = [finding for finding in reachable if finding.host != front_name and not request.is_alone]
    return facts_by_host, front, [*reachable, *check_hosts(request, facts_by_host, results)]


def _test(request: DoctorRequest, diagnosis: Diagnosis, report: Callable[[str], None]) -> Diagnosis:
    """Run the self-test, unless it was skipped or an earlier problem makes it pointless."""
    hostfile, need = diagnosis.hostfile, request.need
    if request.is_quick or hostfile is None or _is_blocked(diagnosis):
        return _without_test(request, diagnosis)
    rates = [link.speed.bytes_per_s for link in diagnosis.links if link.speed and link.network == diagnosis.network]
    rate = min(rates) if rates and diagnosis.backend == "ring" else None
    payloads = all_payloads(need.hidden_size, need.vocab_size, request.world_size, need.prefill_chunk, rate)
    slowest_s = 4 * request.world_size * max(payload.size_bytes for payload in payloads) / (rate or 1e9)
    ranks = "" if request.world_size == 1 else f" of {request.world_size} ranks over {diagnosis.backend}"
    report(f"self-test{ranks}")
    cluster = Cluster(hostfile, diagnosis.backend, diagnosis.pythons)
    result = self_test(cluster, payloads, need.hidden_size, slowest_s)
    if result.is_stalled and diagnosis.network is not None:
        report("looking for the dead link")
        result = _with_dead_links(result, diagnosis, [host.ssh for host in hostfile.hosts])
    findings = [*diagnosis.findings, *result.findings]
    return replace(
        diagnosis,
        self_test=result,
        findings=tuple(findings if has_problem(result.findings) else clear_firewall_warnings(findings)),
    )


def _with_dead_links(result: SelfTest, diagnosis: Diagnosis, hosts: Sequence[str]) -> SelfTest:
    """Measure all links again, and add those that do not answer to the finding."""
    assert diagnosis.network is not None
    link = measure_network(hosts, diagnosis.network, diagnosis.pythons, DEAD_LINK_LIMIT_S)
    problems = "; ".join(link.problems) or "all links work again; the problem was temporary, or it is in MLX"
    message = f"{result.findings[0].message}\n  {problems}"
    return replace(result, findings=(replace(result.findings[0], message=message), *result.findings[1:]))


def _without_test(request: DoctorRequest, diagnosis: Diagnosis) -> Diagnosis:
    """Add a warning that the self-test did not run, unless it was skipped on request."""
    if request.is_quick:
        return diagnosis
    finding = Finding(
        ", ".join(diagnosis.hosts),
        "self-test",
        "warning",
        "not run because of the problems above",
        "fix them, then run the doctor again",
    )
    return replace(diagnosis, findings=(*diagnosis.findings, finding))


def _is_blocked(diagnosis: Diagnosis) -> bool:
    return any(finding.state == "problem" and finding.check in BLOCKING for finding in diagnosis.findings)

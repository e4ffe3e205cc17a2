"""The network for a cluster: found or given, measured between its hosts, chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kimi_mlx.cluster.doctor.findings import Finding
from kimi_mlx.cluster.doctor.host_checks import check_link
from kimi_mlx.cluster.doctor.run_checks import Question
from kimi_mlx.cluster.hosts.host import Backend, Hostfile
from kimi_mlx.cluster.network.links import Measured, Network, candidates, choose
from kimi_mlx.cluster.network.survey import Link, Pair, measure_network, measure_pairs, survey
from kimi_mlx.cluster.network.topology import Topology, networks_of, rdma_of
from kimi_mlx.errors import LinkError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Joined:
    """What came of it.

    Args:
        findings: one or more.
        links: the networks that were measured.
        network: the chosen one; None if there is none, or only rank 0 has an address.
        hostfile: with its addresses; None if the hosts do not reach each other.
    """

    findings: tuple[Finding, ...]
    links: tuple[Link, ...] = ()
    network: Network | None = None
    hostfile: Hostfile | None = None


def join_hosts(question: Question, pythons: Mapping[str, str], joined: Topology, backend: Backend, say: Say) -> Joined:
    """Measure the hostfile's networks, else those that the hosts have in common, and choose.

    Args:
        question: what is examined.
        pythons: host -> any interpreter.
        joined: how the hosts are joined.
        backend: how the ranks are to talk.
        say: told what is being measured.
    """
    hostfile = question.hostfile
    hosts = [host.ssh for host in hostfile.hosts]
    if not hostfile.hosts[0].ips:
        networks = candidates([joined.interfaces[host] for host in hosts], joined.cables)
        return _choose(question, survey(hosts, networks, pythons, say), joined, backend)
    networks = networks_of(hostfile, joined)
    if not networks:
        return _meet_first(question, pythons, say)
    links: list[Link] = []
    for network in networks:
        say(f"measuring {network}")
        links.append(measure_network(hosts, network, pythons))
    return _accept(question, links, backend)


def _choose(question: Question, links: Sequence[Link], joined: Topology, backend: Backend) -> Joined:
    """The best of the networks that were found."""
    measured = {link.network: link.measured for link in links if link.measured is not None}
    is_forced = question.is_link_forced or backend != "ring"
    try:
        network = choose([link.network for link in links], measured, is_forced)
    except LinkError as error:
        silent = "".join(f"\n  {problem}" for link in links for problem in link.problems)
        return Joined((_trouble(question, error.message + silent, error.hint),), tuple(links))
    rdma = rdma_of(question.hostfile, joined)
    hosts = [
        replace(host, ips=(network.addresses[rank],), rdma=rdma[rank] if rdma else ())
        for rank, host in enumerate(question.hostfile.hosts)
    ]
    finding = _check(question, network, measured[network], backend)
    return Joined((finding,), tuple(links), network, Hostfile(tuple(hosts), backend, question.hostfile.envs))


def _accept(question: Question, links: Sequence[Link], backend: Backend) -> Joined:
    """The networks of a hostfile, if all of them answer."""
    problems = [problem for link in links for problem in link.problems]
    if problems:
        remedy = "check the cable and the firewall, or let another network be found: `kimi-mlx doctor --hosts ...`"
        finding = _trouble(question, f"hosts do not reach each other: {'; '.join(problems)}", remedy)
        return Joined((finding,), tuple(links))
    measured = {link.network: link.measured for link in links if link.measured is not None}
    findings = [_check(question, network, each, backend) for network, each in measured.items()]
    return Joined(tuple(findings), tuple(links), links[0].network, replace(question.hostfile, backend=backend))


def _meet_first(question: Question, pythons: Mapping[str, str], say: Say) -> Joined:
    """Only rank 0 has an address, as JACCL needs it: do all others reach it?"""
    first, *others = question.hostfile.hosts
    say(f"measuring the way to {first.ips[0]}")
    _, problems = measure_pairs([Pair(host.ssh, first.ssh, first.ips[0]) for host in others], pythons)
    if problems:
        message = f"not all reach `{first.ssh}`: {'; '.join(problems)}"
        return Joined((_trouble(question, message, "check that address, the cable and the firewall"),))
    finding = Finding(_everybody(question), "link", "ok", f"all reach `{first.ssh}` at {first.ips[0]}")
    return Joined((finding,), hostfile=question.hostfile)


def _check(question: Question, network: Network, measured: Measured, backend: Backend) -> Finding:
    if backend == "ring":
        return check_link(_everybody(question), network, measured, question.is_link_forced)
    return Finding(_everybody(question), "link", "ok", f"{network}: the ranks meet there, and talk over RDMA")


def _trouble(question: Question, message: str, remedy: str | None) -> Finding:
    return Finding(_everybody(question), "link", "trouble", message, remedy)


def _everybody(question: Question) -> str:
    return ", ".join(question.names)

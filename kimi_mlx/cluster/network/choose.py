"""Choose the network for a cluster: measure the given or discovered networks and take the best."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network

from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import Backend, Hostfile
from kimi_mlx.cluster.network.links import (
    LinkSpeed,
    Network,
    choose_measured,
    find_common_networks,
    slow_reasons,
)
from kimi_mlx.cluster.network.measure_networks import Link, Pair, measure_network, measure_networks, measure_pairs
from kimi_mlx.cluster.network.topology import Topology, networks_of, rdma_of, subnet_of
from kimi_mlx.errors import LinkError


@dataclass(frozen=True)
class NetworkChoice:
    """The chosen network, and all measurements.

    Args:
        findings: findings about the networks, at least one.
        links: measured networks.
        network: chosen network; None if no network works, or if only rank 0 has an address.
        hostfile: hostfile with the addresses to use; None if the hosts cannot reach each other.
    """

    findings: tuple[Finding, ...]
    links: tuple[Link, ...] = ()
    network: Network | None = None
    hostfile: Hostfile | None = None


def choose_network(
    hostfile: Hostfile,
    pythons: Mapping[str, str],
    topology: Topology,
    backend: Backend,
    report: Callable[[str], None],
    *,
    is_link_forced: bool = False,
) -> NetworkChoice:
    """Measure the networks of the hostfile, or those that all hosts share, and choose one.

    Args:
        hostfile: hosts; networks are discovered if host 0 has no address.
        pythons: host -> path of any Python interpreter there.
        topology: interfaces and cables of the hosts.
        backend: backend of the ranks.
        report: callback for progress messages.
        is_link_forced: accept a network that is too slow.
    """
    chooser = _Chooser(hostfile, pythons, topology, backend, report, is_link_forced)
    if not hostfile.hosts[0].ips:
        return chooser.discover()
    networks = networks_of(hostfile, topology)
    return chooser.measure_given(networks) if networks else chooser.check_rank_zero()


def check_link(host: str, network: Network, speed: LinkSpeed, is_forced: bool = False) -> Finding:
    """Check that the network between the ranks is fast enough.

    Args:
        host: hosts on the network, separated by `, `.
        network: chosen network.
        speed: its measured speed.
        is_forced: report a slow network as a warning only.
    """
    reasons = slow_reasons(network, speed)
    message = "; ".join([f"{network}: {speed}", *reasons])
    if not reasons:
        return Finding(host, "link", "ok", message)
    remedy = "connect the hosts with a Thunderbolt cable, or at least Ethernet; `--force-link` uses this network anyway"
    return Finding(host, "link", "warning" if is_forced else "problem", message, remedy)


def check_encryption(
    hosts: str, network: Network, subnets: Collection[IPv4Network | None], backend: Backend
) -> Finding:
    """Warn if the data between ranks, which MLX does not encrypt, leaves the cable or the local network.

    Args:
        hosts: hosts on the network, separated by `, `.
        network: chosen network.
        subnets: subnet of each host's address; None if unknown.
        backend: backend of the ranks.
    """
    if network.kind == "thunderbolt":
        return Finding(hosts, "encryption", "ok", "data between ranks is not encrypted; it stays on the cable")
    if backend != "ring":
        message = f"data between ranks is not encrypted; it stays on the cables, only the start goes over {network}"
        return Finding(hosts, "encryption", "ok", message)
    known = {subnet for subnet in subnets if subnet is not None}
    is_routed = network.is_shared and (len(known) > 1 or None in subnets)
    if network.kind == "ethernet" and not is_routed:
        message = f"data between ranks is not encrypted; trust every device on {', '.join(map(str, known))}"
        return Finding(hosts, "encryption", "ok", message)
    path = "a routed network" if is_routed else "Wi-Fi" if network.kind == "wifi" else "a network of unknown kind"
    message = f"{network} is {path}: anyone who can read its traffic can recover prompts and answers"
    remedy = "connect the hosts with a cable, or use a network on which you trust every device: MLX encrypts nothing"
    return Finding(hosts, "encryption", "warning", message, remedy)


@dataclass(frozen=True)
class _Chooser:
    """Arguments of `choose_network`, with a method for each case."""

    hostfile: Hostfile
    pythons: Mapping[str, str]
    topology: Topology
    backend: Backend
    report: Callable[[str], None]
    is_link_forced: bool

    def discover(self) -> NetworkChoice:
        """Measure the networks that all hosts share, and choose the best."""
        hosts = [host.ssh for host in self.hostfile.hosts]
        networks = find_common_networks([self.topology.interfaces[host] for host in hosts], self.topology.cables)
        links = measure_networks(hosts, networks, self.pythons, self.report)
        speeds = {link.network: link.speed for link in links if link.speed is not None}
        try:
            network = choose_measured(
                [link.network for link in links], speeds, self.is_link_forced or self.backend != "ring"
            )
        except LinkError as error:
            problems = "".join(f"\n  {problem}" for link in links for problem in link.problems)
            return NetworkChoice((self._problem(error.message + problems, error.hint),), tuple(links))
        findings = (self._check(network, speeds[network]), self._check_encryption(network))
        return NetworkChoice(findings, tuple(links), network, self._with_addresses(network))

    def measure_given(self, networks: Sequence[Network]) -> NetworkChoice:
        """Measure the networks of the hostfile; all of them must work."""
        hosts = [host.ssh for host in self.hostfile.hosts]
        links: list[Link] = []
        for network in networks:
            self.report(f"measuring {network}")
            links.append(measure_network(hosts, network, self.pythons))
        problems = [problem for link in links for problem in link.problems]
        if problems:
            remedy = "check the cable and the firewall, or let kimi-mlx find a network: `kimi-mlx doctor --hosts HOSTS`"
            finding = self._problem(f"the hosts cannot reach each other: {'; '.join(problems)}", remedy)
            return NetworkChoice((finding,), tuple(links))
        findings = [self._check(link.network, link.speed) for link in links if link.speed is not None]
        findings += [self._check_encryption(link.network) for link in links]
        hostfile = replace(self.hostfile, backend=self.backend)
        return NetworkChoice(tuple(findings), tuple(links), links[0].network, hostfile)

    def check_rank_zero(self) -> NetworkChoice:
        """Check that all hosts reach rank 0, the only one with an address; JACCL needs no more."""
        first, *others = self.hostfile.hosts
        self.report(f"measuring the network to {first.ips[0]}")
        _, problems = measure_pairs([Pair(host.ssh, first.ssh, first.ips[0]) for host in others], self.pythons)
        if problems:
            message = f"not every host can reach `{first.ssh}`: {'; '.join(problems)}"
            return NetworkChoice((self._problem(message, "check that address, the cable and the firewall"),))
        finding = Finding(self._all_hosts, "link", "ok", f"every host can reach `{first.ssh}` at {first.ips[0]}")
        return NetworkChoice((finding,), hostfile=self.hostfile)

    def _with_addresses(self, network: Network) -> Hostfile:
        rdma = rdma_of(self.hostfile, self.topology)
        hosts = [
            replace(host, ips=(network.addresses[rank],), rdma=rdma[rank] if rdma else ())
            for rank, host in enumerate(self.hostfile.hosts)
        ]
        return Hostfile(tuple(hosts), self.backend, self.hostfile.envs)

    def _check(self, network: Network, speed: LinkSpeed) -> Finding:
        if self.backend == "ring":
            return check_link(self._all_hosts, network, speed, self.is_link_forced)
        return Finding(self._all_hosts, "link", "ok", f"{network}: used to connect; data goes over RDMA")

    def _check_encryption(self, network: Network) -> Finding:
        interfaces = [self.topology.interfaces.get(host.ssh, ()) for host in self.hostfile.hosts]
        subnets = [subnet_of(ip, own) for ip, own in zip(network.addresses, interfaces, strict=True)]
        return check_encryption(self._all_hosts, network, subnets, self.backend)

    def _problem(self, message: str, remedy: str | None) -> Finding:
        return Finding(self._all_hosts, "link", "problem", message, remedy)

    @property
    def _all_hosts(self) -> str:
        return ", ".join(self.hostfile.names)

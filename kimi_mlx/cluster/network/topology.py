"""What joins the hosts: addresses, the networks of a hostfile, RDMA devices, and the backend that follows. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import WIRE_LIMIT, Backend, Devices, Host, Hostfile, is_mesh, ring_wires
from kimi_mlx.cluster.network.interfaces import Interface, Kind, linux_interfaces, macos_interfaces
from kimi_mlx.cluster.network.links import KINDS, BridgeConflict, Network, bridge_conflicts
from kimi_mlx.cluster.network.rdma import check_bridge, check_rdma
from kimi_mlx.cluster.network.thunderbolt import (
    Cable,
    ThunderboltPort,
    find_cables,
    rdma_matrix,
    ring_order,
    thunderbolt_ports,
)
from kimi_mlx.errors import LinkError

RING = "`--backend ring` does without"


@dataclass(frozen=True)
class Topology:
    """How the hosts are connected.

    Args:
        interfaces: of each host, by name.
        cables: of Thunderbolt between the hosts, by their numbers.
        rdma: the devices of each host to each other one.
        conflicts: Thunderbolt Bridges, by host.
    """

    interfaces: Mapping[str, tuple[Interface, ...]]
    cables: tuple[Cable, ...]
    rdma: tuple[tuple[Devices, ...], ...]
    conflicts: Mapping[str, BridgeConflict]


def read_topology(hosts: Sequence[Facts]) -> Topology:
    """Read it from the facts; an unreadable part is as none."""
    interfaces = {facts.host: _interfaces(facts) for facts in hosts}
    cables = find_cables([_ports(facts) for facts in hosts])
    devices = [tuple(facts.rdma_ports or ()) for facts in hosts]
    mesh = rdma_matrix(cables, devices)
    conflicts = {conflict.host: conflict for conflict in bridge_conflicts(interfaces)}
    matrix = mesh if is_mesh(mesh) else rdma_matrix(cables, devices, WIRE_LIMIT)
    return Topology(interfaces, cables, matrix, conflicts)


def _interfaces(facts: Facts) -> tuple[Interface, ...]:
    with contextlib.suppress(LinkError):
        if facts.is_mac:
            return macos_interfaces(facts.ifconfig or "", facts.hardware_ports or "")
        return linux_interfaces(facts.ip_addr or "", facts.linux_hints or "")
    return ()


def _ports(facts: Facts) -> tuple[ThunderboltPort, ...]:
    with contextlib.suppress(LinkError):
        if facts.thunderbolt is not None:
            return thunderbolt_ports(facts.thunderbolt, facts.hardware_ports or "")
    return ()


def choose_backend(requested: Backend | None, hosts: Sequence[Facts], topology: Topology) -> Backend:
    """What was requested for, else RDMA if all hosts are ready for it, else the ring."""
    if requested is not None or len(hosts) < 2:
        return requested or "ring"
    if topology.conflicts or any(check_rdma(facts, is_required=True).state != "ok" for facts in hosts):
        return "ring"
    if is_mesh(topology.rdma):
        return "jaccl"
    return "jaccl-ring" if ring_wires(topology.rdma) else "ring"


def rdma_of(hostfile: Hostfile, topology: Topology) -> tuple[tuple[Devices, ...], ...]:
    """The devices of a hostfile, else those that were found, if they make a mesh or a ring."""
    if any(host.rdma for host in hostfile.hosts):
        return tuple(host.rdma for host in hostfile.hosts)
    is_fit = is_mesh(topology.rdma) or ring_wires(topology.rdma) > 0
    return topology.rdma if is_fit and len(topology.rdma) == len(hostfile.hosts) else ()


def check_topology(hostfile: Hostfile, hosts: Sequence[Facts], backend: Backend, topology: Topology) -> list[Finding]:
    """Whether RDMA is ready where it is wanted, and the hostfile's addresses and devices are there."""
    is_wanted = backend != "ring"
    findings = [finding for host in hostfile.hosts for finding in check_addresses(host, topology.interfaces)]
    for facts in hosts:
        if facts.is_mac or is_wanted:
            findings.append(check_rdma(facts, is_wanted))
            findings.append(check_bridge(facts.host, topology.conflicts.get(facts.host), is_wanted))
    if is_wanted and len(hosts) > 1:
        given = [*filter(None, (_check_devices(host, hosts) for host in hostfile.hosts))]
        findings += given or [check_cables(hosts, backend, topology.rdma)]
    return findings


def check_addresses(host: Host, interfaces: Mapping[str, Sequence[Interface]]) -> list[Finding]:
    """Whether the addresses of a hostfile are those of the host."""
    own = [str(address.ip) for each in interfaces.get(host.ssh, ()) for address in each.addresses]
    foreign = [text for text in host.ips if text not in own and not ip_address(text).is_loopback]
    if not host.ips or not own:
        return []
    if not foreign:
        return [Finding(host.ssh, "addresses", "ok", f"its own: {', '.join(host.ips)}")]
    usual = ", ".join(text for text in own if not ip_address(text).is_loopback)
    message = f"{', '.join(foreign)} is not one of its addresses; it has {usual or 'none'}"
    remedy = "mend the hostfile, or let the addresses be found: `kimi-mlx doctor --hosts ... --save FILE`"
    return [Finding(host.ssh, "addresses", "problem", message, remedy)]


def _check_devices(host: Host, hosts: Sequence[Facts]) -> Finding | None:
    """Whether the devices of a hostfile are there; None if it names none."""
    named = [name for devices in host.rdma for name in devices]
    there = [name for facts in hosts if facts.host == host.ssh for name in facts.rdma_ports or ()]
    if not named:
        return None
    missing = [name for name in named if name not in there]
    if not missing:
        return Finding(host.ssh, "devices", "ok", f"{', '.join(named)} are there")
    message = f"{', '.join(missing)} is not there; `ibv_devices` lists {', '.join(there) or 'none'}"
    remedy = "names change with ports and restarts; let them be found: `kimi-mlx doctor --hosts ... --save FILE`"
    return Finding(host.ssh, "devices", "problem", message, remedy)


def check_cables(hosts: Sequence[Facts], backend: Backend, rdma: Sequence[Sequence[Devices]]) -> Finding:
    """Whether the cables between RDMA devices are those that a backend needs."""
    names = [facts.host for facts in hosts]
    everybody = ", ".join(names)
    if backend == "jaccl":
        if is_mesh(rdma):
            return Finding(everybody, "cables", "ok", "RDMA connects every two hosts")
        i, j = next(((i, j) for i in range(len(rdma)) for j in range(i) if not rdma[i][j]), (1, 0))
        message = f"no Thunderbolt 5 cable with RDMA was found between `{names[j]}` and `{names[i]}`"
        return Finding(everybody, "cables", "problem", message, f"plug it in, not into `en2` of a Mac Studio; {RING}")
    if ring_wires(rdma):
        return Finding(everybody, "cables", "ok", "RDMA connects each host to the next and the last to the first")
    order = ring_order(rdma)
    message = "the cables with RDMA do not lead from each host to the next and from the last to the first"
    remedy = f"add the missing cable; {RING}"
    if order is not None:
        remedy = f"give the hosts in the order of the cables: `--hosts {','.join(names[host] for host in order)}`"
    return Finding(everybody, "cables", "problem", message, remedy)


def networks_of(hostfile: Hostfile, topology: Topology) -> list[Network]:
    """The networks of a hostfile whose hosts all have addresses, one a column of them."""
    columns = zip(*(host.ips for host in hostfile.hosts), strict=False)
    return [_network(hostfile, addresses, topology) for addresses in columns]


def _network(hostfile: Hostfile, addresses: tuple[str, ...], topology: Topology) -> Network:
    ends = [
        _end(topology.interfaces.get(host.ssh, ()), text) for host, text in zip(hostfile.hosts, addresses, strict=True)
    ]
    known: list[Kind] = [kind if kind in KINDS else "other" for _, kind in ends]
    return Network(max(known, key=KINDS.index), addresses, tuple(name for name, _ in ends))


def _end(interfaces: Sequence[Interface], text: str) -> tuple[str, Kind]:
    for interface in interfaces:
        if any(str(address.ip) == text for address in interface.addresses):
            return interface.name, interface.kind
    return "?", "other"

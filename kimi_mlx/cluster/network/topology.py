"""How the hosts are connected (addresses, networks, RDMA devices), and which backend they can use. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address

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

RING = "`--backend ring` works without it"


@dataclass(frozen=True)
class Topology:
    """How the hosts are connected.

    Args:
        interfaces: host name -> its network interfaces.
        cables: Thunderbolt cables between the hosts, which are given by index.
        rdma: RDMA devices from each host to every other host.
        conflicts: host name -> its Thunderbolt Bridge.
    """

    interfaces: Mapping[str, tuple[Interface, ...]]
    cables: tuple[Cable, ...]
    rdma: tuple[tuple[Devices, ...], ...]
    conflicts: Mapping[str, BridgeConflict]


def read_topology(hosts: Sequence[Facts]) -> Topology:
    """Read the topology from facts. Parts that cannot be parsed are left empty."""
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
        return linux_interfaces(facts.ip_addr or "", facts.interface_properties or "")
    return ()


def _ports(facts: Facts) -> tuple[ThunderboltPort, ...]:
    with contextlib.suppress(LinkError):
        if facts.thunderbolt is not None:
            return thunderbolt_ports(facts.thunderbolt, facts.hardware_ports or "")
    return ()


def choose_backend(requested: Backend | None, hosts: Sequence[Facts], topology: Topology) -> Backend:
    """Return the requested backend; by default, RDMA if all hosts are ready for it, else the ring."""
    if requested is not None or len(hosts) < 2:
        return requested or "ring"
    if topology.conflicts or any(check_rdma(facts, is_required=True).state != "ok" for facts in hosts):
        return "ring"
    if is_mesh(topology.rdma):
        return "jaccl"
    return "jaccl-ring" if ring_wires(topology.rdma) else "ring"


def rdma_of(hostfile: Hostfile, topology: Topology) -> tuple[tuple[Devices, ...], ...]:
    """Return the RDMA devices of a hostfile; by default, the discovered ones if they form a mesh or a ring."""
    if any(host.rdma for host in hostfile.hosts):
        return tuple(host.rdma for host in hostfile.hosts)
    is_usable = is_mesh(topology.rdma) or ring_wires(topology.rdma) > 0
    return topology.rdma if is_usable and len(topology.rdma) == len(hostfile.hosts) else ()


def check_topology(hostfile: Hostfile, hosts: Sequence[Facts], backend: Backend, topology: Topology) -> list[Finding]:
    """Check RDMA if the backend needs it, and the addresses and devices of the hostfile."""
    is_rdma_used = backend != "ring"
    findings = [finding for host in hostfile.hosts for finding in check_addresses(host, topology.interfaces)]
    for facts in hosts:
        if facts.is_mac or is_rdma_used:
            findings.append(check_rdma(facts, is_rdma_used))
            findings.append(check_bridge(facts.host, topology.conflicts.get(facts.host), is_rdma_used))
    if is_rdma_used and len(hosts) > 1:
        device_findings = [*filter(None, (_check_devices(host, hosts) for host in hostfile.hosts))]
        findings += device_findings or [check_cables(hosts, backend, topology.rdma)]
    return findings


def check_addresses(host: Host, interfaces: Mapping[str, Sequence[Interface]]) -> list[Finding]:
    """Check that the addresses in a hostfile belong to the host."""
    own = [str(address.ip) for interface in interfaces.get(host.ssh, ()) for address in interface.addresses]
    unknown = [ip for ip in host.ips if ip not in own and not ip_address(ip).is_loopback]
    if not host.ips or not own:
        return []
    if not unknown:
        return [Finding(host.ssh, "addresses", "ok", f"belong to this host: {', '.join(host.ips)}")]
    others = ", ".join(ip for ip in own if not ip_address(ip).is_loopback)
    message = f"{', '.join(unknown)} is not an address of this host; it has {others or 'none'}"
    remedy = "fix the hostfile, or let kimi-mlx find the addresses: `kimi-mlx doctor --hosts HOSTS --save FILE`"
    return [Finding(host.ssh, "addresses", "problem", message, remedy)]


def _check_devices(host: Host, hosts: Sequence[Facts]) -> Finding | None:
    """Check that the RDMA devices in a hostfile exist; None if it names none."""
    named = [name for devices in host.rdma for name in devices]
    present = [name for facts in hosts if facts.host == host.ssh for name in facts.rdma_ports or ()]
    if not named:
        return None
    missing = [name for name in named if name not in present]
    if not missing:
        return Finding(host.ssh, "devices", "ok", f"present: {', '.join(named)}")
    message = f"{', '.join(missing)} does not exist; `ibv_devices` lists {', '.join(present) or 'none'}"
    remedy = "names change with ports and restarts; let kimi-mlx find them: `kimi-mlx doctor --hosts HOSTS --save FILE`"
    return Finding(host.ssh, "devices", "problem", message, remedy)


def check_cables(hosts: Sequence[Facts], backend: Backend, rdma: Sequence[Sequence[Devices]]) -> Finding:
    """Check that the cables between RDMA devices are those that the backend needs."""
    names = [facts.host for facts in hosts]
    all_hosts = ", ".join(names)
    if backend == "jaccl":
        if is_mesh(rdma):
            return Finding(all_hosts, "cables", "ok", "RDMA connects every pair of hosts")
        i, j = next(((i, j) for i in range(len(rdma)) for j in range(i) if not rdma[i][j]), (1, 0))
        message = f"no Thunderbolt 5 cable with RDMA was found between `{names[j]}` and `{names[i]}`"
        return Finding(
            all_hosts, "cables", "problem", message, f"connect them, but not at `en2` of a Mac Studio; {RING}"
        )
    if ring_wires(rdma):
        return Finding(all_hosts, "cables", "ok", "RDMA connects each host to the next and the last to the first")
    order = ring_order(rdma)
    message = "the RDMA cables do not connect each host to the next and the last to the first"
    remedy = f"add the missing cable; {RING}"
    if order is not None:
        remedy = f"list the hosts in the order of the cables: `--hosts {','.join(names[host] for host in order)}`"
    return Finding(all_hosts, "cables", "problem", message, remedy)


def networks_of(hostfile: Hostfile, topology: Topology) -> list[Network]:
    """Return the networks of a hostfile: network i has the i-th address of every host."""
    columns = zip(*(host.ips for host in hostfile.hosts), strict=False)
    return [_network(hostfile, addresses, topology) for addresses in columns]


def _network(hostfile: Hostfile, addresses: tuple[str, ...], topology: Topology) -> Network:
    ends = [_end(topology.interfaces.get(host.ssh, ()), ip) for host, ip in zip(hostfile.hosts, addresses, strict=True)]
    kinds: list[Kind] = [kind if kind in KINDS else "other" for _, kind in ends]
    return Network(max(kinds, key=KINDS.index), addresses, tuple(name for name, _ in ends))


def subnet_of(ip: str, interfaces: Sequence[Interface]) -> IPv4Network | None:
    """Return the subnet of a host's address; None if no interface has this address."""
    addresses = [address for interface in interfaces for address in interface.addresses if str(address.ip) == ip]
    return addresses[0].network if addresses else None


def _end(interfaces: Sequence[Interface], ip: str) -> tuple[str, Kind]:
    for interface in interfaces:
        if any(str(address.ip) == ip for address in interface.addresses):
            return interface.name, interface.kind
    return "?", "other"

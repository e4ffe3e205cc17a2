"""Find the Thunderbolt cables between hosts, and the RDMA devices that they connect. Pure.

Each port is a domain with an identifier, and reports the identifier of the domain at the other end of its cable.
Not yet tested on hardware; it follows published captures.
Source: extract_connectivity of mlx 0.32, python/mlx/_distributed_utils/config.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from kimi_mlx.cluster.hosts.host import WIRE_LIMIT, Devices, Matrix
from kimi_mlx.cluster.network.interfaces import parse_hardware_ports
from kimi_mlx.errors import LinkError

THUNDERBOLT_COMMANDS = ("system_profiler SPThunderboltDataType -json", "networksetup -listallhardwareports")
"""Commands whose output `thunderbolt_ports` parses; `parse_ibv_devices` parses that of `ibv_devices`."""

RDMA_SPEED_GBIT_S = 80
"""Minimum speed for RDMA (Thunderbolt 5). Slower ports have an RDMA device too, but it does not work."""


@dataclass(frozen=True)
class ThunderboltPort:
    """A Thunderbolt port of a host.

    Args:
        receptacle: number of the port on the case.
        interface: network interface, such as `en5`; None if the system lists none.
        domain: identifier of the port.
        peer_domain: identifier of the port at the other end; None if no computer is connected.
        gbit_per_s: speed of the link; None if unknown.
    """

    receptacle: str
    interface: str | None
    domain: str
    peer_domain: str | None = None
    gbit_per_s: int | None = None


@dataclass(frozen=True)
class Cable:
    """A cable between two hosts (indices), with the network interface at either end."""

    host: int
    interface: str
    peer: int
    peer_interface: str
    gbit_per_s: int | None = None

    def ends(self) -> tuple[tuple[int, int, str], tuple[int, int, str]]:
        """Return the cable as seen from both sides: (host, other host, interface)."""
        return (self.host, self.peer, self.interface), (self.peer, self.host, self.peer_interface)


def thunderbolt_ports(profile: str, hardware_ports: str) -> tuple[ThunderboltPort, ...]:
    """Return the ports of a Mac, sorted by receptacle, from the output of `THUNDERBOLT_COMMANDS`.

    Raises:
        LinkError: the first output is not that of `system_profiler`.
    """
    devices = {port: device for device, port in parse_hardware_ports(hardware_ports).items()}
    try:
        buses = cast("list[dict[str, Any]]", json.loads(profile)["SPThunderboltDataType"])
        ports = [_port(bus, devices) for bus in buses if "domain_uuid_key" in bus and "receptacle_1_tag" in bus]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise LinkError(
            f"`{THUNDERBOLT_COMMANDS[0]}` printed no Thunderbolt data: {profile[:80]!r}",
            hint="run it on that host; if it works there, please report this",
        ) from None
    return tuple(sorted(ports, key=lambda port: (len(port.receptacle), port.receptacle)))


def _port(bus: dict[str, Any], devices: dict[str, str]) -> ThunderboltPort:
    tag = bus["receptacle_1_tag"]
    receptacle = str(tag.get("receptacle_id_key", ""))
    # a display or a drive has no domain
    peers = [item["domain_uuid_key"] for item in bus.get("_items", []) if "domain_uuid_key" in item]
    speed = re.fullmatch(r"(\d+) Gb/s", str(tag.get("current_speed_key")))  # `Up to 120 Gb/s` has no cable
    return ThunderboltPort(
        receptacle=receptacle,
        interface=devices.get(f"Thunderbolt {receptacle}"),
        domain=bus["domain_uuid_key"],
        peer_domain=peers[0] if peers else None,
        gbit_per_s=int(speed[1]) if speed else None,
    )


def find_cables(hosts: Sequence[Sequence[ThunderboltPort]]) -> tuple[Cable, ...]:
    """Return the cables between these hosts. A cable counts even if only one end reports it."""
    owners = {port.domain: (index, port) for index, ports in enumerate(hosts) for port in ports}
    cables: dict[frozenset[str], Cable] = {}
    for host, ports in enumerate(hosts):
        for port in ports:
            peer, other = owners.get(port.peer_domain or "", (host, port))
            if peer != host and port.interface and other.interface:
                cable = Cable(host, port.interface, peer, other.interface, port.gbit_per_s or other.gbit_per_s)
                cables.setdefault(frozenset({port.domain, other.domain}), cable)
    return tuple(cables.values())


def parse_ibv_devices(text: str) -> tuple[str, ...]:
    """Return the RDMA devices that `ibv_devices` lists."""
    return tuple(re.findall(r"^\s*(rdma_\w+)", text, re.MULTILINE | re.ASCII))


def rdma_matrix(
    cables: Sequence[Cable], devices: Sequence[Sequence[str]], wires: int = 1
) -> tuple[tuple[Devices, ...], ...]:
    """Return the RDMA devices from each host to every other host, in the form of a hostfile.

    Args:
        cables: cables between the hosts; skipped if too slow, or if one end has no RDMA device.
        devices: RDMA devices of each host, from `parse_ibv_devices`.
        wires: maximum number of cables to use between two hosts: one in a mesh, up to `WIRE_LIMIT` in a ring.
    """
    count = len(devices)
    matrix: list[list[list[str]]] = [[[] for _ in range(count)] for _ in range(count)]
    for cable in cables:
        ends = [(host, peer, f"rdma_{interface}") for host, peer, interface in cable.ends()]
        is_fast = cable.gbit_per_s is None or cable.gbit_per_s >= RDMA_SPEED_GBIT_S
        if is_fast and all(device in devices[host] for host, _, device in ends):
            for host, peer, device in ends:
                matrix[host][peer].append(device)
    return tuple(tuple(tuple(names[: min(wires, WIRE_LIMIT)]) for names in row) for row in matrix)


def ring_order(rdma: Matrix) -> tuple[int, ...] | None:
    """Return an order of the hosts, starting with host 0, in which cables form a ring; None if there is none."""
    return next(_rings(rdma, (0,)), None) if len(rdma) > 1 else None


def _rings(rdma: Matrix, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if len(path) == len(rdma):
        if rdma[path[-1]][path[0]]:
            yield path
        return
    for host in range(len(rdma)):
        if host not in path and rdma[path[-1]][host]:
            yield from _rings(rdma, (*path, host))

"""Parse a host's network interfaces and their kinds from the output of its commands. Pure.

IPv4 only, because MLX's ring and JACCL use nothing else. The macOS side has not been tested on hardware yet; it follows
published captures.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface
from typing import Any, Literal, cast

from kimi_mlx.cluster.hosts.facts import INTERFACE_PROPERTIES
from kimi_mlx.errors import LinkError

Kind = Literal["thunderbolt", "ethernet", "wifi", "loopback", "other"]
"""Medium of an interface. `other` is neither cable nor Wi-Fi: VPN, AirDrop, containers."""

MACOS_COMMANDS = ("ifconfig -a", "networksetup -listallhardwareports")
"""Commands whose output `macos_interfaces` parses."""

LINUX_COMMANDS = ("ip -j addr", INTERFACE_PROPERTIES)
"""Commands whose output `linux_interfaces` parses."""


@dataclass(frozen=True)
class Interface:
    """A network interface.

    Args:
        name: interface name, such as `en5`.
        kind: medium of the interface.
        addresses: IPv4 addresses with the network's prefix.
        mac: hardware address; None if it has none.
        is_up: whether it is on and, if the system reports that, has a link.
        members: interfaces that a bridge connects.
    """

    name: str
    kind: Kind
    addresses: tuple[IPv4Interface, ...] = ()
    mac: str | None = None
    is_up: bool = True
    members: tuple[str, ...] = ()


def parse_hardware_ports(text: str) -> dict[str, str]:
    """Return device -> port, such as `en5` -> `Thunderbolt 4`, from `networksetup -listallhardwareports`."""
    return {device: port for port, device in re.findall(r"Hardware Port: *(.+?) *\n *Device: *(\S+)", text)}


def macos_interfaces(ifconfig: str, hardware_ports: str) -> tuple[Interface, ...]:
    """Return the interfaces of a Mac from the output of `MACOS_COMMANDS`. Unknown blocks are skipped."""
    ports = parse_hardware_ports(hardware_ports)
    blocks = re.split(r"^(?=\S)", ifconfig, flags=re.MULTILINE)
    interfaces = [_macos_interface(block, ports) for block in blocks]
    return tuple(interface for interface in interfaces if interface is not None)


def _macos_interface(block: str, ports: Mapping[str, str]) -> Interface | None:
    head = re.match(r"(\S+): flags=\w+<(.*?)>", block)
    if head is None:
        return None
    name, flags = head[1], head[2].split(",")
    members = tuple(re.findall(r"^\s+member: (\S+)", block, re.MULTILINE))
    mac = re.search(r"^\s+ether ([0-9a-f:]+)", block, re.MULTILINE)
    inet = re.findall(r"^\s+inet ([\d.]+)(?: --> \S+)? netmask (0x[0-9a-f]{8})\b", block, re.MULTILINE)
    return Interface(
        name=name,
        kind="loopback" if "LOOPBACK" in flags else _macos_kind(name, ports, members),
        addresses=tuple(interface for address, mask in inet for interface in _with_mask(address, int(mask, 16))),
        mac=mac[1] if mac else None,
        is_up="UP" in flags and "status: inactive" not in block,
        members=members,
    )


def _macos_kind(name: str, ports: Mapping[str, str], members: tuple[str, ...]) -> Kind:
    port = ports.get(name, "")
    if re.fullmatch(r"Thunderbolt( \d+)?( Bridge| \d+)", port):
        return "thunderbolt"
    if port in ("Wi-Fi", "AirPort"):
        return "wifi"
    # adapters too: `Thunderbolt Ethernet`, `USB 10/100/1000 LAN`
    if re.search(r"\bEthernet\b|\bLAN\b|\d*Gb?E\b", port):
        return "ethernet"
    is_bridge = name.startswith("bridge") and bool(members)  # has no port name if its service was removed
    return "thunderbolt" if is_bridge and all("Thunderbolt" in ports.get(member, "") for member in members) else "other"


def _with_mask(address: str, mask: int) -> list[IPv4Interface]:
    """Return the address with its mask; empty if either is invalid."""
    try:
        return [IPv4Interface(f"{address}/{ipaddress.IPv4Address(mask)}")]
    except ValueError:
        return []


def linux_interfaces(ip_json: str, properties: str) -> tuple[Interface, ...]:
    """Return the interfaces of a Linux host from the output of `LINUX_COMMANDS`.

    Raises:
        LinkError: the first output is not the JSON of `ip`.
    """
    try:
        # older versions of `ip` print an empty object for an entry that was filtered out
        entries = [entry for entry in cast("list[dict[str, Any]]", json.loads(ip_json)) if entry]
        by_name = {
            name: frozenset(words) for name, *words in map(str.split, filter(str.strip, properties.splitlines()))
        }
        return tuple(_linux_interface(entry, entries, by_name) for entry in entries)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise LinkError(
            f"`ip -j addr` printed no list of interfaces: {ip_json[:80]!r}", hint="install iproute2 on that host"
        ) from None


def _linux_interface(
    entry: Mapping[str, Any], entries: Iterable[Mapping[str, Any]], properties: Mapping[str, frozenset[str]]
) -> Interface:
    name, flags = entry["ifname"], entry.get("flags", ())
    members = tuple(other["ifname"] for other in entries if other.get("master") == name)
    inet = [address for address in entry.get("addr_info", ()) if address.get("family") == "inet"]
    is_ether = entry.get("link_type") == "ether"
    return Interface(
        name=name,
        kind=_linux_kind(name, "LOOPBACK" in flags, is_ether, properties, members),
        addresses=tuple(IPv4Interface(f"{address['local']}/{address['prefixlen']}") for address in inet),
        mac=entry.get("address") if is_ether else None,
        is_up="UP" in flags and "LOWER_UP" in flags,
        members=members,
    )


def _linux_kind(
    name: str, is_loopback: bool, is_ether: bool, properties: Mapping[str, frozenset[str]], members: Iterable[str]
) -> Kind:
    own = properties.get(name, frozenset())
    if is_loopback:
        return "loopback"
    if "driver=thunderbolt-net" in own or re.fullmatch(r"thunderbolt\d+", name):
        return "thunderbolt"
    if own & {"wireless", "phy80211"}:
        return "wifi"
    if "bridge" in own:  # of an Ethernet port, or of containers only
        return "ethernet" if any("device" in properties.get(member, ()) for member in members) else "other"
    return "ethernet" if is_ether and "tun_flags" not in own else "other"

"""The network interfaces of a host, and over what each goes, from what its own commands print. Pure.

Only IPv4: MLX's ring and JACCL connect over nothing else. The macOS side is not yet seen on hardware: it is written
after published captures.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface
from typing import Any, Literal, cast

from kimi_mlx.cluster.hosts.facts import LINUX_HINTS
from kimi_mlx.errors import LinkError

Kind = Literal["thunderbolt", "ethernet", "wifi", "loopback", "other"]
"""Over what an interface goes; `other` is what is no cable and no radio: VPN, AirDrop, containers."""

MACOS_COMMANDS = ("ifconfig -a", "networksetup -listallhardwareports")
"""What `macos_interfaces` reads."""

LINUX_COMMANDS = ("ip -j addr", LINUX_HINTS)
"""What `linux_interfaces` reads."""


@dataclass(frozen=True)
class Interface:
    """A network interface.

    Args:
        name: such as `en5`.
        kind: over what it goes.
        addresses: IPv4, with the prefix of the network.
        mac: its hardware address, if it has one.
        is_up: switched on and, where the system tells, with a link.
        members: of a bridge, the interfaces that it joins.
    """

    name: str
    kind: Kind
    addresses: tuple[IPv4Interface, ...] = ()
    mac: str | None = None
    is_up: bool = True
    members: tuple[str, ...] = ()


def parse_hardware_ports(text: str) -> dict[str, str]:
    """Hardware port by device, `{"en5": "Thunderbolt 4"}`, of `networksetup -listallhardwareports`."""
    return {device: port for port, device in re.findall(r"Hardware Port: *(.+?) *\n *Device: *(\S+)", text)}


def macos_interfaces(ifconfig: str, hardware_ports: str) -> tuple[Interface, ...]:
    """The interfaces of a Mac, from what `MACOS_COMMANDS` print. What cannot be understood is left out."""
    ports = parse_hardware_ports(hardware_ports)
    blocks = re.split(r"^(?=\S)", ifconfig, flags=re.MULTILINE)
    found = [each for block in blocks if (each := _macos_interface(block, ports)) is not None]
    return tuple(found)


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
        addresses=tuple(each for address, mask in inet for each in _with_mask(address, int(mask, 16))),
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
    if re.search(
        r"\bEthernet\b|\bLAN\b|\d*Gb?E\b", port
    ):  # adapters too: `Thunderbolt Ethernet`, `USB 10/100/1000 LAN`
        return "ethernet"
    is_bridge = name.startswith("bridge") and bool(members)  # its service may have been removed, and so its name
    return "thunderbolt" if is_bridge and all("Thunderbolt" in ports.get(each, "") for each in members) else "other"


def _with_mask(address: str, mask: int) -> list[IPv4Interface]:
    """An address with its network's mask; none if either is none."""
    try:
        return [IPv4Interface(f"{address}/{ipaddress.IPv4Address(mask)}")]
    except ValueError:
        return []


def linux_interfaces(ip_json: str, hints: str) -> tuple[Interface, ...]:
    """The interfaces of a Linux host, from what `LINUX_COMMANDS` print.

    Raises:
        LinkError: the first is no JSON of `ip`.
    """
    try:
        # older versions of `ip` print an empty object for what was filtered out
        entries = [entry for entry in cast("list[dict[str, Any]]", json.loads(ip_json)) if entry]
        known = {name: frozenset(words) for name, *words in map(str.split, filter(str.strip, hints.splitlines()))}
        return tuple(_linux_interface(entry, entries, known) for entry in entries)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise LinkError(
            f"`ip -j addr` printed no list of interfaces: {ip_json[:80]!r}", hint="install iproute2 there"
        ) from None


def _linux_interface(
    entry: Mapping[str, Any], entries: Iterable[Mapping[str, Any]], hints: Mapping[str, frozenset[str]]
) -> Interface:
    name, flags = entry["ifname"], entry.get("flags", ())
    members = tuple(each["ifname"] for each in entries if each.get("master") == name)
    inet = [each for each in entry.get("addr_info", ()) if each.get("family") == "inet"]
    is_ether = entry.get("link_type") == "ether"
    return Interface(
        name=name,
        kind=_linux_kind(name, "LOOPBACK" in flags, is_ether, hints, members),
        addresses=tuple(IPv4Interface(f"{each['local']}/{each['prefixlen']}") for each in inet),
        mac=entry.get("address") if is_ether else None,
        is_up="UP" in flags and "LOWER_UP" in flags,
        members=members,
    )


def _linux_kind(
    name: str, is_loopback: bool, is_ether: bool, hints: Mapping[str, frozenset[str]], members: Iterable[str]
) -> Kind:
    own = hints.get(name, frozenset())
    if is_loopback:
        return "loopback"
    if "driver=thunderbolt-net" in own or re.fullmatch(r"thunderbolt\d+", name):
        return "thunderbolt"
    if own & {"wireless", "phy80211"}:
        return "wifi"
    if "bridge" in own:  # of a cable, or of containers only
        return "ethernet" if any("device" in hints.get(each, ()) for each in members) else "other"
    return "ethernet" if is_ether and "tun_flags" not in own else "other"

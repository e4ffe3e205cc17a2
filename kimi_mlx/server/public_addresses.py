"""Addresses of hosts on the public internet, told from those of private networks and of this machine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv6 addresses that a translator of the network connects to the IPv4 address in their last 32 bits (RFC 6052)."""

FURTHER_NETWORKS = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # protocol assignments; Oracle's cloud has its metadata service there
            "192.88.99.0/24",  # 6to4 relays
            "168.63.129.16/32",  # Azure's services for its own machines
            "3fff::/20",  # documentation
            "5f00::/16",  # segment routing
        ),
    )
)
"""Networks that are not public either, although Python's `ipaddress` reports them as global, in some versions."""

Resolver = Callable[[str, int], Sequence[str]]
"""Returns the addresses of a host name and a port. Raises OSError if there are none."""


def resolve_host(name: str, port: int) -> list[str]:
    """Return the addresses of a host name, best first; a `Resolver`."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public_address(address: str) -> bool:
    """Return whether an address belongs to the public internet.

    Not public are loopback, private, link-local, shared, reserved and multicast addresses and those of cloud metadata
    services; nor IPv6 addresses that lead to such an IPv4 address (IPv4-mapped, 6to4, NAT64) or that use Teredo.

    Args:
        address: IPv4 or IPv6 address, which may have a zone (`fe80::1%en0`).

    Source: IANA's special-purpose address registries, as in Python's `ipaddress`.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = _inner_ipv4(ip)
        if inner is None:
            return ip in GLOBAL_UNICAST and ip.teredo is None and _is_public(ip)
        ip = inner
    return not ip.is_multicast and not ip.is_reserved and _is_public(ip)


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return ip.is_global and not any(ip in network for network in FURTHER_NETWORKS)


def _inner_ipv4(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that packets to an IPv6 address reach in the end, if there is one."""
    if ip in NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour

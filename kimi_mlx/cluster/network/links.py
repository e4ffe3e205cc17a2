"""Find the networks that hosts have in common, and choose the one that the ranks use. Pure.

Thunderbolt is preferred to Ethernet, and Ethernet to Wi-Fi, unless measurements show that another is clearly faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network
from itertools import islice, product

from kimi_mlx.cluster.network.interfaces import Interface, Kind
from kimi_mlx.cluster.network.thunderbolt import Cable
from kimi_mlx.errors import LinkError
from kimi_mlx.units import format_seconds

KINDS: tuple[Kind, ...] = ("thunderbolt", "ethernet", "wifi", "other")
"""Kinds of networks, best first."""

ROUND_TRIP_LIMIT_S = 0.005
"""A token needs 61 to 122 exchanges; at 5 ms each, they take about half a second."""

RATE_LIMIT_BYTES_PER_S = 1e9 / 8
"""1 Gbit/s. 512 prompt tokens cause 7 MB per layer, 430 MB in total."""

EXCHANGE_BYTES = 1 << 18
"""Size used to compare networks: between the 14 kB of one token and the 7 MB of a prompt chunk."""

PREFERENCE = 1.25
"""Speed-up from which a network is chosen over one of a better kind."""

PAIRING_LIMIT = 16
"""Maximum number of pairings to try, as self-assigned addresses do not show which interfaces are connected."""

_LINK_LOCAL = IPv4Network("169.254.0.0/16")


@dataclass(frozen=True)
class Network:
    """Addresses at which hosts reach each other.

    Args:
        kind: kind of the network; the worst kind of its interfaces.
        addresses: one address per host, in the order of the hosts.
        interfaces: interface of each address.
        is_shared: whether all hosts reach each other; if not, each host reaches only the next, at its address.
    """

    kind: Kind
    addresses: tuple[str, ...]
    interfaces: tuple[str, ...]
    is_shared: bool = True

    def __str__(self) -> str:
        names = {"thunderbolt": "Thunderbolt", "ethernet": "Ethernet", "wifi": "Wi-Fi"}
        return f"{names.get(self.kind, 'another network')} ({', '.join(self.addresses)})"


@dataclass(frozen=True)
class LinkSpeed:
    """Speed of a network over its slowest pair of hosts: round-trip time and one-way rate."""

    round_trip_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        return f"{self.round_trip_s * 1e3:.2f} ms round trip, {self.bytes_per_s * 8e-9:.2f} Gbit/s"


@dataclass(frozen=True)
class BridgeConflict:
    """A Thunderbolt Bridge that prevents RDMA: RDMA needs addresses on the bridge's members, which have none."""

    host: str
    interface: str
    members: tuple[str, ...]

    @property
    def message(self) -> str:
        """Description of the conflict."""
        ports = ", ".join(self.members)
        return f"`{self.host}`: the Thunderbolt Bridge `{self.interface}` ({ports}) is on, but RDMA needs it off"

    @property
    def hint(self) -> str:
        """Commands that turn the bridge off."""
        removals = [f"sudo ifconfig {self.interface} deletem {member}" for member in self.members]
        off = 'sudo networksetup -setnetworkserviceenabled "Thunderbolt Bridge" off'
        commands = " && ".join([off, *removals, f"sudo ifconfig {self.interface} down"])
        return f"run on `{self.host}`: `{commands}`"


def find_common_networks(hosts: Sequence[Sequence[Interface]], cables: Sequence[Cable] = ()) -> list[Network]:
    """Return the networks that all hosts may have in common, best kind first.

    Args:
        hosts: interfaces of each host.
        cables: Thunderbolt cables, if known. A ring of more than two hosts needs them, unless each cable has its own
            subnet.
    """
    if len(hosts) < 2:
        return []
    networks = dict.fromkeys([*_cable_ring(hosts, cables), *_same_subnet(hosts)])
    usable = [network for network in networks if len(set(network.addresses)) == len(hosts)]
    return sorted(usable, key=lambda network: (KINDS.index(network.kind), not network.is_shared))


_End = tuple[Interface, IPv4Interface]
"""An interface and one of its addresses."""


def _ends(interfaces: Iterable[Interface]) -> Iterator[_End]:
    for interface in interfaces:
        if interface.is_up and interface.kind in KINDS:
            yield from ((interface, address) for address in interface.addresses)


def _same_subnet(hosts: Sequence[Sequence[Interface]]) -> Iterator[Network]:
    """Yield a network per subnet; for self-assigned addresses, one per kind and pairing of interfaces."""
    by_subnet: dict[IPv4Network, list[list[_End]]] = defaultdict(lambda: [[] for _ in hosts])
    for index, interfaces in enumerate(hosts):
        for end in _ends(interfaces):
            by_subnet[end[1].network][index].append(end)
    for subnet, choices in by_subnet.items():
        if subnet != _LINK_LOCAL:
            if all(choices):
                yield _network([min(ends, key=lambda end: KINDS.index(end[0].kind)) for ends in choices])
            continue
        for kind in KINDS:
            # bridges first
            of_kind = [
                sorted((end for end in ends if end[0].kind == kind), key=lambda end: not end[0].members)
                for ends in choices
            ]
            yield from (_network(ends) for ends in islice(product(*of_kind), PAIRING_LIMIT))


def _network(ends: Sequence[_End], is_shared: bool = True) -> Network:
    return Network(
        kind=KINDS[max(KINDS.index(interface.kind) for interface, _ in ends)],
        addresses=tuple(str(address.ip) for _, address in ends),
        interfaces=tuple(interface.name for interface, _ in ends),
        is_shared=is_shared,
    )


def _cable_ring(hosts: Sequence[Sequence[Interface]], cables: Sequence[Cable]) -> Iterator[Network]:
    """Yield the ring of Thunderbolt cables in the order of the hosts; each address faces the previous host."""
    if len(hosts) < 3:
        return  # two hosts share a subnet, see _same_subnet
    ends = [_cabled_end(hosts, host, (host - 1) % len(hosts), cables) for host in range(len(hosts))]
    if all(ends):
        yield _network([end for end in ends if end], is_shared=False)


def _cabled_end(hosts: Sequence[Sequence[Interface]], host: int, peer: int, cables: Sequence[Cable]) -> _End | None:
    """Return where the cable from `peer` ends at `host`: from the cables, else from a subnet that only they share."""
    own = [end for end in _ends(hosts[host]) if end[0].kind == "thunderbolt"]
    cabled = {name for cable in cables for a, b, name in cable.ends() if (a, b) == (host, peer)}
    subnets = {end[1].network for end in _ends(hosts[peer]) if end[0].kind == "thunderbolt"} - {_LINK_LOCAL}
    by_cable = [end for end in own if end[0].name in cabled]
    by_subnet = [end for end in own if end[1].network in subnets]
    return next(iter([*by_cable, *by_subnet]), None)


def parse_speed(message: Mapping[str, object]) -> LinkSpeed:
    """Return the speed from a message of `measure`'s client.

    Raises:
        LinkError: the message reports an error, or cannot be parsed.
    """
    try:
        if "error" in message:
            raise LinkError(str(message["error"]))
        return LinkSpeed(float(str(message["round_trip_s"])), float(str(message["bytes_per_s"])))
    except (ValueError, KeyError):
        raise LinkError(f"the measured speed cannot be read: {str(message)[:200]}") from None


def combine_speeds(speeds: Iterable[LinkSpeed]) -> LinkSpeed:
    """Combine several pairs of hosts: return the longest round trip and the lowest rate."""
    pairs = list(speeds)
    return LinkSpeed(max(speed.round_trip_s for speed in pairs), min(speed.bytes_per_s for speed in pairs))


def exchange_time_s(speed: LinkSpeed) -> float:
    """Return the time of an exchange of `EXCHANGE_BYTES`."""
    return speed.round_trip_s + EXCHANGE_BYTES / speed.bytes_per_s


def slow_reasons(network: Network, speed: LinkSpeed) -> list[str]:
    """Return the reasons why a network is too slow for a cluster; empty if it is fast enough."""
    trip, limit = format_seconds(speed.round_trip_s), format_seconds(ROUND_TRIP_LIMIT_S)
    rate, min_rate = speed.bytes_per_s * 8e-9, RATE_LIMIT_BYTES_PER_S * 8e-9
    return [
        *(["it is Wi-Fi"] if network.kind == "wifi" else []),
        *([f"a round trip takes {trip}, the limit is {limit}"] if speed.round_trip_s > ROUND_TRIP_LIMIT_S else []),
        *(
            [f"its rate is {rate:.2f} Gbit/s, the minimum is {min_rate:.0f}"]
            if speed.bytes_per_s < RATE_LIMIT_BYTES_PER_S
            else []
        ),
    ]


def choose_measured(
    networks: Sequence[Network], speeds: Mapping[Network, LinkSpeed], is_forced: bool = False
) -> Network:
    """Return the network to use: the first that is fast enough, unless another is faster by `PREFERENCE`.

    Args:
        networks: networks from `find_common_networks`, in their order.
        speeds: measured speeds; a network without one does not work.
        is_forced: choose the fastest network even if all are too slow.

    Raises:
        LinkError: no network works, or all are too slow.
    """
    working = [network for network in networks if network in speeds]
    if not working:
        tried = "; ".join(map(str, networks))
        raise LinkError(
            f"the hosts cannot reach each other over any of: {tried}" if tried else "the hosts have no common network",
            hint="connect them with a Thunderbolt cable and turn the Thunderbolt Bridge on in the network settings of "
            "each, allow local connections in the firewall, or put the addresses into a hostfile",
        )
    fast = [network for network in working if not slow_reasons(network, speeds[network])]
    if not fast and not is_forced:
        raise _too_slow(working, speeds)
    best_s = min(exchange_time_s(speeds[network]) for network in fast or working)
    tolerance = PREFERENCE if fast else 1.0
    return next(network for network in fast or working if exchange_time_s(speeds[network]) <= best_s * tolerance)


def _too_slow(networks: Sequence[Network], speeds: Mapping[Network, LinkSpeed]) -> LinkError:
    lines = [
        f"{network}: {speeds[network]}; {', '.join(slow_reasons(network, speeds[network]))}" for network in networks
    ]
    return LinkError(
        "every network between the hosts is too slow for a cluster:\n  " + "\n  ".join(lines),
        hint="connect them with a Thunderbolt cable, or use the slow network anyway: `--force-link`",
    )


def bridge_conflicts(hosts: Mapping[str, Sequence[Interface]]) -> list[BridgeConflict]:
    """Return the Thunderbolt Bridges that must be turned off before RDMA works, given the interfaces of each host."""
    return [
        BridgeConflict(host, interface.name, interface.members)
        for host, interfaces in hosts.items()
        for interface in interfaces
        if interface.kind == "thunderbolt" and interface.is_up and interface.members
    ]

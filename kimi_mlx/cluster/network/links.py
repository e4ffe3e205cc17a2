"""The networks that hosts have in common, and which of them the ranks should use. Pure.

Thunderbolt before Ethernet before Wi-Fi, but what is measured decides.
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
"""The best first."""

ROUND_TRIP_LIMIT_S = 0.005
"""A token waits for 61 to 122 exchanges: at 5 ms that is one token in half a second."""

RATE_LIMIT_BYTES_PER_S = 1e9 / 8
"""1 Gbit/s: 512 tokens of a prompt are 7 MB a layer, 430 MB in all."""

EXCHANGE_BYTES = 1 << 18
"""The size by which networks are compared: between a token's 14 kB and a piece of a prompt's 7 MB."""

PREFERENCE = 1.25
"""How much faster a network must be to be taken before one of a better kind."""

PAIRING_LIMIT = 16
"""Self-assigned addresses do not say which cable is which: at most so many pairings are tried."""

_LINK_LOCAL = IPv4Network("169.254.0.0/16")


@dataclass(frozen=True)
class Network:
    """Addresses at which hosts reach each other.

    Args:
        kind: over what it goes; the worst of its ends.
        addresses: one a host, in the order of the hosts.
        interfaces: whose addresses they are.
        is_shared: whether everybody reaches everybody; else each host only the next, at the next one's address.
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
    """What a network does, over its slowest pair of hosts: the time there and back, and the rate one way."""

    round_trip_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        return f"{self.round_trip_s * 1e3:.2f} ms there and back, {self.bytes_per_s * 8e-9:.2f} Gbit/s"


@dataclass(frozen=True)
class BridgeConflict:
    """A Thunderbolt Bridge that is in the way of RDMA: its members have no address of their own, which RDMA needs."""

    host: str
    interface: str
    members: tuple[str, ...]

    @property
    def message(self) -> str:
        """What is wrong."""
        ports = ", ".join(self.members)
        return f"`{self.host}`: the Thunderbolt Bridge `{self.interface}` ({ports}) is on, but RDMA needs it off"

    @property
    def hint(self) -> str:
        """What to type there."""
        removals = [f"sudo ifconfig {self.interface} deletem {member}" for member in self.members]
        off = 'sudo networksetup -setnetworkserviceenabled "Thunderbolt Bridge" off'
        commands = " && ".join([off, *removals, f"sudo ifconfig {self.interface} down"])
        return f"on `{self.host}` type: `{commands}`"


def candidates(hosts: Sequence[Sequence[Interface]], cables: Sequence[Cable] = ()) -> list[Network]:
    """The networks that all hosts may have in common, the best kind first.

    Args:
        hosts: the interfaces of each.
        cables: the Thunderbolt cables, if they are known; more than two hosts in a circle of cables need them, unless
            each cable is a network of its own.
    """
    if len(hosts) < 2:
        return []
    found = [*_cable_circle(hosts, cables), *_same_subnet(hosts)]
    usable = [each for each in dict.fromkeys(found) if len(set(each.addresses)) == len(hosts)]
    return sorted(usable, key=lambda network: (KINDS.index(network.kind), not network.is_shared))


_End = tuple[Interface, IPv4Interface]
"""An address, and whose it is."""


def _ends(interfaces: Iterable[Interface]) -> Iterator[_End]:
    for interface in interfaces:
        if interface.is_up and interface.kind in KINDS:
            yield from ((interface, address) for address in interface.addresses)


def _same_subnet(hosts: Sequence[Sequence[Interface]]) -> Iterator[Network]:
    """One network for each subnet; for self-assigned addresses one for each kind and pairing of interfaces."""
    by_subnet: dict[IPv4Network, list[list[_End]]] = defaultdict(lambda: [[] for _ in hosts])
    for number, interfaces in enumerate(hosts):
        for end in _ends(interfaces):
            by_subnet[end[1].network][number].append(end)
    for subnet, choices in by_subnet.items():
        if subnet != _LINK_LOCAL:
            if all(choices):
                yield _network([min(each, key=lambda end: KINDS.index(end[0].kind)) for each in choices])
            continue
        for kind in KINDS:
            same = [sorted((e for e in each if e[0].kind == kind), key=lambda e: not e[0].members) for each in choices]
            yield from (_network(ends) for ends in islice(product(*same), PAIRING_LIMIT))


def _network(ends: Sequence[_End], is_shared: bool = True) -> Network:
    return Network(
        kind=KINDS[max(KINDS.index(interface.kind) for interface, _ in ends)],
        addresses=tuple(str(address.ip) for _, address in ends),
        interfaces=tuple(interface.name for interface, _ in ends),
        is_shared=is_shared,
    )


def _cable_circle(hosts: Sequence[Sequence[Interface]], cables: Sequence[Cable]) -> Iterator[Network]:
    """A circle of Thunderbolt cables in the order of the hosts: each end is where the host before reaches the host."""
    if len(hosts) < 3:
        return  # two are one pair, which the subnets tell
    ends = [_cabled_end(hosts, host, (host - 1) % len(hosts), cables) for host in range(len(hosts))]
    if all(ends):
        yield _network([end for end in ends if end], is_shared=False)


def _cabled_end(hosts: Sequence[Sequence[Interface]], host: int, peer: int, cables: Sequence[Cable]) -> _End | None:
    """Where the cable from `peer` ends at `host`: told by the cables, else by a subnet of their own."""
    ours = [end for end in _ends(hosts[host]) if end[0].kind == "thunderbolt"]
    cabled = {name for cable in cables for a, b, name in cable.ends() if (a, b) == (host, peer)}
    subnets = {end[1].network for end in _ends(hosts[peer]) if end[0].kind == "thunderbolt"} - {_LINK_LOCAL}
    told = [end for end in ours if end[0].name in cabled]
    return next(iter([*told, *(end for end in ours if end[1].network in subnets)]), None)


def parse_speed(message: Mapping[str, object]) -> LinkSpeed:
    """The figures of the client of `measure`.

    Raises:
        LinkError: the message tells of an error, or is none of its.
    """
    try:
        if "error" in message:
            raise LinkError(str(message["error"]))
        return LinkSpeed(float(str(message["round_trip_s"])), float(str(message["bytes_per_s"])))
    except (ValueError, KeyError):
        raise LinkError(f"its figures cannot be read: {str(message)[:200]}") from None


def slowest(measured: Iterable[LinkSpeed]) -> LinkSpeed:
    """Several pairs of hosts as one: the longest round trip, the lowest rate."""
    pairs = list(measured)
    return LinkSpeed(max(each.round_trip_s for each in pairs), min(each.bytes_per_s for each in pairs))


def exchange_time_s(measured: LinkSpeed) -> float:
    """The time of an exchange of `EXCHANGE_BYTES`."""
    return measured.round_trip_s + EXCHANGE_BYTES / measured.bytes_per_s


def slow_reasons(network: Network, measured: LinkSpeed) -> list[str]:
    """Why a network is too slow for a cluster; nothing if it is not."""
    trip, limit = format_seconds(measured.round_trip_s), format_seconds(ROUND_TRIP_LIMIT_S)
    rate, least = measured.bytes_per_s * 8e-9, RATE_LIMIT_BYTES_PER_S * 8e-9
    return [
        *(["it is Wi-Fi"] if network.kind == "wifi" else []),
        *([f"a round trip takes {trip}, the limit is {limit}"] if measured.round_trip_s > ROUND_TRIP_LIMIT_S else []),
        *(
            [f"it carries {rate:.2f} Gbit/s, {least:.0f} is the least"]
            if measured.bytes_per_s < RATE_LIMIT_BYTES_PER_S
            else []
        ),
    ]


def choose(networks: Sequence[Network], measured: Mapping[Network, LinkSpeed], force: bool = False) -> Network:
    """The network to use: of the fast ones the first, unless another is faster by `PREFERENCE`.

    Args:
        networks: from `candidates`, in their order.
        measured: what was measured; a network that is not in it does not answer.
        force: take the fastest, though it is too slow.

    Raises:
        LinkError: none answers, or all are too slow.
    """
    seen = [network for network in networks if network in measured]
    if not seen:
        tried = "; ".join(map(str, networks))
        raise LinkError(
            f"the hosts do not reach each other over any of: {tried}" if tried else "the hosts have no common network",
            hint="join them with a Thunderbolt cable and switch the Thunderbolt Bridge on in the network settings of "
            "each, allow local connections in the firewall, or give addresses in a hostfile",
        )
    fast = [network for network in seen if not slow_reasons(network, measured[network])]
    if not fast and not force:
        raise _too_slow(seen, measured)
    best = min(exchange_time_s(measured[network]) for network in fast or seen)
    near = PREFERENCE if fast else 1.0
    return next(network for network in fast or seen if exchange_time_s(measured[network]) <= best * near)


def _too_slow(seen: Sequence[Network], measured: Mapping[Network, LinkSpeed]) -> LinkError:
    lines = [
        f"{network}: {measured[network]}; {', '.join(slow_reasons(network, measured[network]))}" for network in seen
    ]
    return LinkError(
        "every network between the hosts is too slow for a cluster:\n  " + "\n  ".join(lines),
        hint="join them with a Thunderbolt cable, or use the slow one all the same: `--force-link`",
    )


def bridge_conflicts(hosts: Mapping[str, Sequence[Interface]]) -> list[BridgeConflict]:
    """The Thunderbolt Bridges that must go before RDMA can be used, by the names of the hosts."""
    return [
        BridgeConflict(host, interface.name, interface.members)
        for host, interfaces in hosts.items()
        for interface in interfaces
        if interface.kind == "thunderbolt" and interface.is_up and interface.members
    ]

"""Find the common networks of hosts and choose one."""

from __future__ import annotations

from ipaddress import IPv4Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cluster.network.interfaces import Interface, Kind
from kimi_mlx.cluster.network.links import (
    KINDS,
    LinkSpeed,
    Network,
    bridge_conflicts,
    choose_measured,
    combine_speeds,
    find_common_networks,
    parse_speed,
    slow_reasons,
)
from kimi_mlx.cluster.network.thunderbolt import Cable
from kimi_mlx.errors import LinkError
from tests.unit.cluster.captures import linux, mac


def interface(name: str, kind: Kind, *addresses: str, is_up: bool = True, members: tuple[str, ...] = ()) -> Interface:
    return Interface(name, kind, tuple(map(IPv4Interface, addresses)), is_up=is_up, members=members)


TB = Network("thunderbolt", ("169.254.1.1", "169.254.1.2"), ("bridge0", "bridge0"))
LAN = Network("ethernet", ("192.168.1.1", "192.168.1.2"), ("en0", "en0"))
AIR = Network("wifi", ("192.168.2.1", "192.168.2.2"), ("en1", "en1"))
GOOD = LinkSpeed(0.0004, 6e9)


def test_mac_studio_and_macbook_have_thunderbolt_and_wifi() -> None:
    found = find_common_networks([mac("studio"), mac("macbook")])
    assert [(each.kind, each.addresses) for each in found] == [
        ("thunderbolt", ("169.254.87.12", "169.254.201.7")),
        ("wifi", ("192.168.1.10", "192.168.1.41")),  # one end is Ethernet, the other is not
    ]


def test_linux_host_and_mac_share_the_lan() -> None:
    [network] = find_common_networks([linux(), mac("studio")])
    assert network == Network("ethernet", ("192.168.1.20", "192.168.1.10"), ("eth0", "en0"))


def test_down_loopback_and_identical_interfaces_are_no_network() -> None:
    one = [
        interface("lo0", "loopback", "127.0.0.1/8"),
        interface("docker0", "other", "172.17.0.1/16"),
        interface("en0", "ethernet", "10.0.0.1/24", is_up=False),
        interface("utun0", "other", "10.8.0.1/32"),
    ]
    two = [*one[:2], interface("en0", "ethernet", "10.0.0.2/24"), interface("utun0", "other", "10.8.0.2/32")]
    assert find_common_networks([one, two]) == []
    assert find_common_networks([one]) == []


def test_self_assigned_addresses_are_paired_by_kind_bridge_first() -> None:
    hosts = [
        [
            interface("en0", "ethernet", f"169.254.{n}.1/16"),
            interface("en3", "thunderbolt", f"169.254.{n}.2/16"),
            interface("bridge0", "thunderbolt", f"169.254.{n}.3/16", members=("en4",)),
        ]
        for n in (1, 2)
    ]
    assert [each.interfaces for each in find_common_networks(hosts)] == [
        ("bridge0", "bridge0"), ("bridge0", "en3"), ("en3", "bridge0"), ("en3", "en3"), ("en0", "en0"),
    ]  # fmt: skip


def test_cable_ring_with_a_subnet_per_cable_is_a_network() -> None:
    """mlx.distributed_config sets it up like this: a /30 for each cable."""
    hosts = [
        [
            interface("en2", "thunderbolt", f"192.168.0.{4 * n + 1}/30"),
            interface("en3", "thunderbolt", f"192.168.0.{4 * ((n - 1) % 3) + 2}/30"),
        ]
        for n in range(3)
    ]
    [network] = find_common_networks(hosts)
    assert not network.is_shared
    # each host's address is its end of the cable to the previous host
    assert network.addresses == ("192.168.0.10", "192.168.0.2", "192.168.0.6")


def test_cable_ring_with_self_assigned_addresses_needs_the_cables() -> None:
    hosts = [[interface(f"en{k}", "thunderbolt", f"169.254.{n}.{k}/16") for k in (2, 3)] for n in range(3)]
    cables = [Cable(n, "en2", (n + 1) % 3, "en3") for n in range(3)]
    assert not any(not each.is_shared for each in find_common_networks(hosts))
    ring = next(each for each in find_common_networks(hosts, cables) if not each.is_shared)
    assert ring.addresses == ("169.254.0.3", "169.254.1.3", "169.254.2.3")


kinds = st.sampled_from(KINDS)
host_interfaces = st.lists(
    st.builds(
        lambda kind, subnet, number, up: interface(f"en{number}", kind, f"{subnet}.{number}/16", is_up=up),
        kinds,
        st.sampled_from(["169.254.0", "10.0.0", "10.1.0"]),
        st.integers(1, 9),
        st.booleans(),
    ),
    max_size=5,
)


@given(st.lists(host_interfaces, min_size=2, max_size=4))
def test_candidates_are_sorted_by_kind_and_share_a_subnet(hosts: list[list[Interface]]) -> None:
    found = find_common_networks(hosts)
    order = [KINDS.index(each.kind) for each in found]
    assert order == sorted(order)
    assert len(set(found)) == len(found)
    for network in found:
        subnets = {IPv4Interface(f"{address}/16").network for address in network.addresses}
        assert not network.is_shared or len(subnets) == 1
        assert len(set(network.addresses)) == len(hosts)


def test_thunderbolt_is_chosen_unless_another_is_clearly_faster() -> None:
    assert choose_measured([TB, LAN], {TB: GOOD, LAN: GOOD}) is TB
    assert choose_measured([TB, LAN], {TB: LinkSpeed(0.00045, 5e9), LAN: LinkSpeed(0.0004, 5e9)}) is TB
    assert choose_measured([TB, LAN], {TB: LinkSpeed(0.002, 2e8), LAN: LinkSpeed(0.0003, 1.2e9)}) is LAN
    assert choose_measured([TB, LAN], {LAN: LinkSpeed(0.0003, 1.2e9)}) is LAN


@pytest.mark.parametrize(
    ("network", "measured", "reason"),
    [
        (AIR, GOOD, "it is Wi-Fi"),
        (LAN, LinkSpeed(0.0051, 6e9), "a round trip takes 5 ms, the limit is 5 ms"),
        (LAN, LinkSpeed(0.012, 6e9), "a round trip takes 12 ms, the limit is 5 ms"),
        (LAN, LinkSpeed(0.001, 117e6), "its rate is 0.94 Gbit/s, the minimum is 1"),
    ],
)
def test_slow_network_is_refused_unless_forced(network: Network, measured: LinkSpeed, reason: str) -> None:
    with pytest.raises(LinkError) as caught:
        choose_measured([network], {network: measured})
    assert reason in caught.value.message
    assert network.addresses[0] in caught.value.message
    assert "Gbit/s" in caught.value.message
    assert "--force-link" in (caught.value.hint or "")
    assert choose_measured([network], {network: measured}, is_forced=True) is network


def test_fast_network_is_preferred_to_a_slow_one_even_if_forced() -> None:
    slow = LinkSpeed(0.02, 1e7)
    assert choose_measured([TB, LAN, AIR], {TB: slow, LAN: GOOD, AIR: GOOD}, is_forced=True) is LAN


def test_unreachable_hosts_have_no_network() -> None:
    with pytest.raises(LinkError, match=r"over any of: Thunderbolt \(169.254.1.1, 169.254.1.2\)"):
        choose_measured([TB], {}, is_forced=True)
    with pytest.raises(LinkError, match="no common network"):
        choose_measured([], {})


measurements = st.builds(LinkSpeed, st.floats(1e-5, 0.1), st.floats(1e5, 1e10))


@given(st.dictionaries(st.sampled_from([TB, LAN, AIR]), measurements))
def test_chosen_network_is_measured_and_fast(measured: dict[Network, LinkSpeed]) -> None:
    fast = [each for each in measured if not slow_reasons(each, measured[each])]
    try:
        assert choose_measured([TB, LAN, AIR], measured) in fast
    except LinkError:
        assert not fast


def test_speeds_are_parsed_and_the_slowest_pair_counts() -> None:
    assert parse_speed({"kind": "measured", "round_trip_s": 0.0004, "bytes_per_s": 6e9, "bytes": 1}) == GOOD
    assert combine_speeds([GOOD, LinkSpeed(0.0003, 1e9)]) == LinkSpeed(0.0004, 1e9)
    with pytest.raises(LinkError, match="Connection refused"):
        parse_speed({"kind": "error", "error": "Connection refused"})
    for message in ({}, {"round_trip_s": "x", "bytes_per_s": 1}):
        with pytest.raises(LinkError, match="cannot be read"):
            parse_speed(message)


def test_active_thunderbolt_bridge_conflicts_with_rdma() -> None:
    hosts = {"a": mac("macbook"), "b": mac("studio-rdma", "studio"), "c": linux()}
    [conflict] = bridge_conflicts(hosts)
    assert (conflict.host, conflict.interface, conflict.members) == ("a", "bridge0", ("en1", "en2", "en3"))
    assert "`a`: the Thunderbolt Bridge `bridge0` (en1, en2, en3) is on" in conflict.message
    assert "sudo ifconfig bridge0 deletem en1 && " in conflict.hint

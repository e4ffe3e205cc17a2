"""Find the Thunderbolt cables between hosts and their RDMA devices."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cluster.hosts.host import Host, Hostfile, is_mesh, ring_wires
from kimi_mlx.cluster.hosts.hostfile import parse_hostfile, to_json
from kimi_mlx.cluster.network.thunderbolt import (
    Cable,
    ThunderboltPort,
    find_cables,
    parse_ibv_devices,
    rdma_matrix,
    ring_order,
    thunderbolt_ports,
)
from kimi_mlx.errors import LinkError
from tests.unit.cluster.captures import capture, ports


def test_ports_of_a_mac_studio() -> None:
    studio = ports("studio")
    # the sixth has no identifier, because nothing is plugged in
    assert [(port.receptacle, port.interface) for port in studio] == [(str(n), f"en{n + 1}") for n in range(1, 6)]
    assert [port.receptacle for port in studio if port.peer_domain] == ["2"]  # not 4: it has a drive
    assert [port.gbit_per_s for port in studio] == [None, 80, None, 80, None]


def test_cable_between_two_macs() -> None:
    assert find_cables([ports("studio"), ports("macbook")]) == (Cable(0, "en3", 1, "en1", 80),)
    assert find_cables([ports("macbook"), ports("studio")]) == (Cable(0, "en1", 1, "en3", 80),)
    assert find_cables([ports("studio")]) == ()


def test_rdma_devices_of_a_pair() -> None:
    cables = find_cables([ports("studio"), ports("macbook")])
    studio = parse_ibv_devices(capture("studio-ibv-devices.txt"))
    assert studio == ("rdma_en2", "rdma_en3", "rdma_en5", "rdma_en4", "rdma_en6", "rdma_en7")
    assert rdma_matrix(cables, [studio, ("rdma_en1",)]) == (((), ("rdma_en3",)), (("rdma_en1",), ()))
    assert rdma_matrix(cables, [studio, ()]) == (((), ()), ((), ()))


def test_thunderbolt_4_has_no_rdma() -> None:
    devices = [("rdma_en1",), ("rdma_en1",)]
    assert not rdma_matrix([Cable(0, "en1", 1, "en1", 40)], devices)[0][1]
    assert rdma_matrix([Cable(0, "en1", 1, "en1", None)], devices)[0][1]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"SPThunderboltDataType": 3}', '{"SPThunderboltDataType": [3]}']
)
def test_invalid_system_profile_is_an_error(text: str) -> None:
    with pytest.raises(LinkError, match="printed no Thunderbolt data"):
        thunderbolt_ports(text, "")


def test_host_without_thunderbolt_has_no_ports() -> None:
    assert thunderbolt_ports('{"SPThunderboltDataType": []}', "") == ()
    assert parse_ibv_devices("") == ()


cablings = st.integers(2, 6).flatmap(
    lambda count: st.tuples(st.just(count), st.sets(st.sampled_from(list(combinations(range(count), 2)))))
)


@given(cablings)
def test_any_cabling_is_recovered_from_its_ports(cabling: tuple[int, set[tuple[int, int]]]) -> None:
    """The ports of given cables yield those cables; their RDMA matrix is valid in a hostfile."""
    count, pairs = cabling
    ends = {frozenset(pair): (f"en{pair[1]}", f"en{pair[0]}") for pair in pairs}
    hosts = [
        [ThunderboltPort(str(j), f"en{j}", f"{i}-{j}", f"{j}-{i}", 80)
         for j in range(count) if frozenset({i, j}) in ends and i != j]
        for i in range(count)
    ]  # fmt: skip
    cables = find_cables(hosts)
    assert {(each.host, each.peer) for each in cables} == pairs
    matrix = rdma_matrix(cables, [[f"rdma_en{j}" for j in range(count)]] * count)
    assert is_mesh(matrix) == (len(pairs) == count * (count - 1) // 2)
    hostfile = Hostfile(
        tuple(Host(f"m{i}", (f"10.0.0.{i + 1}",), row) for i, row in enumerate(matrix)),
        backend="jaccl" if is_mesh(matrix) else None,
    )
    assert parse_hostfile(json.loads(to_json(hostfile)), "`x`") == hostfile
    order = ring_order(matrix)
    if order is None:
        assert not ring_wires(matrix)
    else:
        assert sorted(order) == list(range(count))
        assert ring_wires([[matrix[i][j] for j in order] for i in order]) == 1


def test_two_cables_between_two_hosts_keep_their_order_at_both_ends() -> None:
    cables = [Cable(0, "en1", 1, "en5"), Cable(1, "en6", 0, "en2")]
    devices = [("rdma_en1", "rdma_en2"), ("rdma_en5", "rdma_en6")]
    matrix = rdma_matrix(cables, devices, wires=4)
    assert (matrix[0][1], matrix[1][0]) == (("rdma_en1", "rdma_en2"), ("rdma_en5", "rdma_en6"))
    assert rdma_matrix(cables, devices)[1][0] == ("rdma_en5",)

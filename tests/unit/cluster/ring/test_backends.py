"""Host files and environment variables of MLX's backends, in the format of mlx.launch."""

from __future__ import annotations

import itertools
import json

from kimi_mlx.cluster.hosts.host import Host, Hostfile
from kimi_mlx.cluster.hosts.launch import without_ring_variables
from kimi_mlx.cluster.ring.backends import (
    backend_file,
    backend_variables,
    coordinator,
    jaccl_devices,
    ring_hosts,
)

TWO = Hostfile(
    (
        Host("a", ("10.0.0.1", "10.0.1.1"), ((), ("rdma_en5",))),
        Host("b", ("10.0.0.2", "10.0.1.2"), (("rdma_en3", "rdma_en4"), ())),
    )
)


def test_ring_hosts_have_a_port_for_each_address() -> None:
    expected = [["10.0.0.1:32323", "10.0.1.1:32324"], ["10.0.0.2:32325", "10.0.1.2:32326"]]
    assert ring_hosts(TWO, itertools.count(32323)) == expected
    assert json.loads(backend_file(TWO, "ring", itertools.count(32323))) == expected


def test_jaccl_device_matrix_and_coordinator() -> None:
    matrix = [[None, "rdma_en5"], [["rdma_en3", "rdma_en4"], None]]
    assert jaccl_devices(TWO) == matrix
    assert json.loads(backend_file(TWO, "jaccl", ())) == matrix
    assert coordinator(TWO, 32323) == "10.0.0.1:32323"


def test_variables_of_each_backend() -> None:
    assert backend_variables("ring", 1, "/f", "") == {"MLX_RANK": "1", "MLX_HOSTFILE": "/f"}
    jaccl = {"MLX_RANK": "0", "MLX_IBV_DEVICES": "/f", "MLX_JACCL_COORDINATOR": "10.0.0.1:1"}
    assert backend_variables("jaccl", 0, "/f", "10.0.0.1:1") == jaccl
    assert backend_variables("jaccl-ring", 0, "/f", "10.0.0.1:1") == {**jaccl, "MLX_JACCL_RING": "1"}
    base = {"PATH": "/bin", "JACCL_RANK": "3", "MLX_JACCL_RING": "1", "MLX_METAL_FAST_SYNCH": "1"}
    assert without_ring_variables(base) == {"PATH": "/bin", "MLX_METAL_FAST_SYNCH": "1"}

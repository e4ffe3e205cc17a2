"""What MLX's backends want of a hostfile: a file each, and the environment of each rank. Pure.

Source: launch_ring and launch_jaccl of mlx 0.32, python/mlx/_distributed_utils/launch.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from kimi_mlx.cluster.hosts.host import Backend, Hostfile
from kimi_mlx.cluster.hosts.hostfile import devices_value


def ring_hosts(hostfile: Hostfile, ports: Iterable[int]) -> list[list[str]]:
    """Where each rank listens, with one port an address in the order of ranks and their addresses.

    `itertools.count(32323)` numbers them as mlx.launch does.
    """
    numbers = iter(ports)
    return [[f"{address}:{next(numbers)}" for address in host.ips] for host in hostfile.hosts]


def jaccl_devices(hostfile: Hostfile) -> list[list[str | list[str] | None]]:
    """The RDMA devices of each rank to each rank."""
    return [[devices_value(each) for each in host.rdma] for host in hostfile.hosts]


def coordinator(hostfile: Hostfile, port: int) -> str:
    """Where JACCL's rank 0 waits for the others, over TCP."""
    return f"{hostfile.hosts[0].ips[0]}:{port}"


def backend_file(hostfile: Hostfile, backend: Backend, ports: Iterable[int]) -> str:
    """The text of the file that each rank reads at its start; `ports` are for the ring alone."""
    return json.dumps(ring_hosts(hostfile, ports) if backend == "ring" else jaccl_devices(hostfile))


def backend_variables(backend: Backend, rank: int, file: str, coordinator: str) -> dict[str, str]:
    """What a rank's environment gets on top of `without_ring_variables`.

    Args:
        backend: how the ranks talk.
        rank: its number.
        file: the path, on its host, of what `backend_file` made.
        coordinator: from the function of that name; the ring needs none.
    """
    if backend == "ring":
        return {"MLX_RANK": str(rank), "MLX_HOSTFILE": file}
    variables = {"MLX_RANK": str(rank), "MLX_IBV_DEVICES": file, "MLX_JACCL_COORDINATOR": coordinator}
    return {**variables, "MLX_JACCL_RING": "1"} if backend == "jaccl-ring" else variables

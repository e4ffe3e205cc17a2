"""Files and environment variables that MLX's backends read, made from a hostfile. Pure.

Source: launch_ring and launch_jaccl of mlx 0.32, python/mlx/_distributed_utils/launch.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from kimi_mlx.cluster.hosts.host import Backend, Hostfile
from kimi_mlx.cluster.hosts.hostfile import devices_value


def ring_hosts(hostfile: Hostfile, ports: Iterable[int]) -> list[list[str]]:
    """Return the addresses at which each rank listens, with one port per address, in the order of ranks and addresses.

    `itertools.count(32323)` numbers them as mlx.launch does.
    """
    numbers = iter(ports)
    return [[f"{address}:{next(numbers)}" for address in host.ips] for host in hostfile.hosts]


def jaccl_devices(hostfile: Hostfile) -> list[list[str | list[str] | None]]:
    """Return the RDMA devices from each rank to each rank."""
    return [[devices_value(device) for device in host.rdma] for host in hostfile.hosts]


def coordinator(hostfile: Hostfile, port: int) -> str:
    """Return the TCP address at which JACCL's rank 0 waits for the others."""
    return f"{hostfile.hosts[0].ips[0]}:{port}"


def backend_file(hostfile: Hostfile, backend: Backend, ports: Iterable[int]) -> str:
    """Return the text of the file that each rank reads at its start. Only the ring uses `ports`."""
    return json.dumps(ring_hosts(hostfile, ports) if backend == "ring" else jaccl_devices(hostfile))


def backend_variables(backend: Backend, rank: int, file: str, coordinator: str) -> dict[str, str]:
    """Return the environment variables of a rank, in addition to `without_ring_variables`.

    Args:
        backend: backend of the group.
        rank: number of the rank.
        file: path, on the rank's host, of the text from backend_file().
        coordinator: address from coordinator(); unused by the ring.
    """
    if backend == "ring":
        return {"MLX_RANK": str(rank), "MLX_HOSTFILE": file}
    variables = {"MLX_RANK": str(rank), "MLX_IBV_DEVICES": file, "MLX_JACCL_COORDINATOR": coordinator}
    return {**variables, "MLX_JACCL_RING": "1"} if backend == "jaccl-ring" else variables

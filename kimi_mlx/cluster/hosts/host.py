"""Hosts of a cluster as MLX's hostfile describes them: ssh name, addresses, RDMA devices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kimi_mlx.cluster.hosts.launch import FAST_SYNC

Backend = Literal["ring", "jaccl", "jaccl-ring"]
"""Transport between ranks: TCP, RDMA with a cable between every two hosts, or RDMA with the cables in a circle."""

Devices = tuple[str, ...]
"""RDMA devices from one host to another, such as `("rdma_en5",)`; empty without a cable."""

Matrix = Sequence[Sequence[Devices]]
"""RDMA devices, indexed by their own host, then by the host at the other end of the cable."""

MESH_LIMIT = 8
"""Largest number of hosts in a JACCL mesh (MESH_MAX_PEERS in mlx 0.32)."""

WIRE_LIMIT = 4
"""Largest number of cables between two neighbors of a JACCL ring (RING_MAX_CONNS in mlx 0.32)."""


@dataclass(frozen=True)
class Host:
    """One rank of the hostfile: a host of the cluster with its addresses.

    Args:
        ssh: name for `ssh`, such as `mac-b` or `me@mac-b.local`.
        ips: IPv4 addresses. Ring: addresses to which the previous rank connects. JACCL: only those of rank 0 are used.
        rdma: RDMA devices to each rank, in the order of ranks, none to itself; empty without RDMA.
    """

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[Devices, ...] = ()


@dataclass(frozen=True)
class Hostfile:
    """Hosts in the order of ranks.

    Args:
        hosts: one host per rank.
        backend: transport; None leaves it to the command line, whose default is `ring`.
        envs: environment variables `NAME=value` of every rank.
    """

    hosts: tuple[Host, ...]
    backend: Backend | None = None
    envs: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the hosts, without duplicates."""
        return list(dict.fromkeys(host.ssh for host in self.hosts))

    def with_envs(self, envs: Sequence[str]) -> Hostfile:
        """Return a copy with these variables added; they replace variables of the same names."""
        names = {variable.partition("=")[0] for variable in envs}
        kept = [variable for variable in self.envs if variable.partition("=")[0] not in names]
        return replace(self, envs=(*kept, *envs))

    def with_fast_sync(self, is_on: bool) -> Hostfile:
        """Return a copy with the fast fence if `is_on`, else this hostfile unchanged."""
        return self.with_envs([f"{FAST_SYNC}=1"]) if is_on else self

    @property
    def has_fast_sync(self) -> bool:
        """Whether the fast fence is on."""
        values = [value for name, _, value in (variable.partition("=") for variable in self.envs) if name == FAST_SYNC]
        return values not in ([], ["0"])


@dataclass(frozen=True)
class Cluster:
    """Hosts of the ranks, with interpreters and transport.

    Args:
        hostfile: ranks with their addresses.
        backend: transport between ranks.
        pythons: host -> path of its interpreter.
        hostfile_rewriter: function from the ring's hostfile to one hostfile per rank, for tests and benchmarks that
            put a relay between ranks; None gives all ranks the same file.
    """

    hostfile: Hostfile
    backend: Backend
    pythons: Mapping[str, str]
    hostfile_rewriter: Callable[[str], Sequence[str]] | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.hostfile.hosts)

    @property
    def names(self) -> list[str]:
        """Names of the hosts, without duplicates."""
        return self.hostfile.names

    def cpu_slot(self, rank: int) -> tuple[int, int]:
        """Return the index of a rank among the ranks of its host, and the number of these ranks."""
        hosts = self.hostfile.hosts
        local_ranks = [other for other, host in enumerate(hosts) if host.ssh == hosts[rank].ssh]
        return local_ranks.index(rank), len(local_ranks)

    def addresses(self, rank: int) -> tuple[str, ...]:
        """Return the addresses a rank listens on: all in a ring, only rank 0's with JACCL, none for a single rank."""
        ips = self.hostfile.hosts[rank].ips
        if self.size == 1:
            return ()
        return ips if self.backend == "ring" else ips[: rank == 0]


def local_cluster(size: int, fast_sync: bool = False) -> Cluster:
    """Return a cluster of ranks on this machine, over loopback, with or without the fast fence."""
    hosts = (Host("localhost", ("127.0.0.1",)),) * size
    return Cluster(Hostfile(hosts).with_fast_sync(fast_sync), "ring", {"localhost": sys.executable})


def is_mesh(rdma: Matrix) -> bool:
    """Return whether a cable connects every two hosts."""
    count = len(rdma)
    return count > 1 and all(rdma[i][j] for i in range(count) for j in range(count) if i != j)


def ring_wires(rdma: Matrix) -> int:
    """Return the number of cables from each host to the next, and the last to the first; 0 if the numbers differ.

    Source: Config::is_valid_ring of mlx 0.32.
    """
    count = len(rdma)
    wires = {len(rdma[i][j]) for i in range(count) for j in ((i + 1) % count, i - 1)}
    return wires.pop() if count > 1 and len(wires) == 1 else 0

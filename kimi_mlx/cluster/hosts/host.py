"""The hosts of a cluster as MLX's hostfile describes them: how to log in, addresses, RDMA devices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kimi_mlx.cluster.hosts.launch import FAST_SYNC

Backend = Literal["ring", "jaccl", "jaccl-ring"]
"""How the ranks talk: over TCP, over RDMA with a cable between every two hosts, or over RDMA in a circle."""

Devices = tuple[str, ...]
"""RDMA devices from one host to another, such as `("rdma_en5",)`; none where there is no cable."""

Matrix = Sequence[Sequence[Devices]]
"""Devices by the host they belong to and the host they lead to."""

MESH_LIMIT = 8
"""Hosts in a JACCL mesh (MESH_MAX_PEERS in mlx 0.32)."""

WIRE_LIMIT = 4
"""Cables between two neighbours of a JACCL ring (RING_MAX_CONNS in mlx 0.32)."""


@dataclass(frozen=True)
class Host:
    """A computer of the cluster, or one of the ranks on it.

    Args:
        ssh: what `ssh` is told to reach it: `mac-b`, `me@mac-b.local`.
        ips: IPv4 addresses. Ring: where its neighbour of the rank before reaches it. JACCL: of rank 0, for everybody.
        rdma: its devices to each rank, in the order of ranks, none to itself; empty without RDMA.
    """

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[Devices, ...] = ()


@dataclass(frozen=True)
class Hostfile:
    """Hosts in the order of ranks.

    Args:
        hosts: one a rank.
        backend: how they talk; None leaves it to the command line, and to `ring` in the end.
        envs: `NAME=value` for every rank.
    """

    hosts: tuple[Host, ...]
    backend: Backend | None = None
    envs: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the hosts, without duplicates."""
        return list(dict.fromkeys(host.ssh for host in self.hosts))

    def with_envs(self, envs: Sequence[str]) -> Hostfile:
        """With these variables, too, which come before those of the same names."""
        names = {each.partition("=")[0] for each in envs}
        kept = [each for each in self.envs if each.partition("=")[0] not in names]
        return replace(self, envs=(*kept, *envs))

    def with_fast_sync(self, is_on: bool) -> Hostfile:
        """With the fast fence; without leaves it to the variables that are there."""
        return self.with_envs([f"{FAST_SYNC}=1"]) if is_on else self

    @property
    def has_fast_sync(self) -> bool:
        """Whether its ranks have the fast fence."""
        values = [value for name, _, value in (each.partition("=") for each in self.envs) if name == FAST_SYNC]
        return values not in ([], ["0"])


@dataclass(frozen=True)
class Cluster:
    """Where ranks run and how they talk.

    Args:
        hostfile: the ranks, with the addresses to use.
        backend: how they talk.
        pythons: host -> its interpreter.
        hostfile_rewriter: function from the ring's hostfile to one hostfile per rank, for tests and benchmarks that
            put a relay between ranks; None gives all ranks the same file.
    """

    hostfile: Hostfile
    backend: Backend
    pythons: Mapping[str, str]
    hostfile_rewriter: Callable[[str], Sequence[str]] | None = None

    @property
    def size(self) -> int:
        """How many ranks."""
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
        """Where a rank listens: all of its addresses in a ring; with JACCL rank 0 alone; a rank alone nowhere."""
        ips = self.hostfile.hosts[rank].ips
        if self.size == 1:
            return ()
        return ips if self.backend == "ring" else ips[: rank == 0]


def local_cluster(size: int, fast_sync: bool = False) -> Cluster:
    """Ranks on this machine, over loopback, with the fast fence or without."""
    hosts = (Host("localhost", ("127.0.0.1",)),) * size
    return Cluster(Hostfile(hosts).with_fast_sync(fast_sync), "ring", {"localhost": sys.executable})


def is_mesh(rdma: Matrix) -> bool:
    """Whether a cable joins every two hosts."""
    count = len(rdma)
    return count > 1 and all(rdma[i][j] for i in range(count) for j in range(count) if i != j)


def ring_wires(rdma: Matrix) -> int:
    """How many cables join each host to the next and the last to the first; 0 if that differs or one has none.

    Source: Config::is_valid_ring of mlx 0.32.
    """
    count = len(rdma)
    wires = {len(rdma[i][j]) for i in range(count) for j in ((i + 1) % count, i - 1)}
    return wires.pop() if count > 1 and len(wires) == 1 else 0

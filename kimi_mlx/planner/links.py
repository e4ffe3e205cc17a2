"""The time that ranks need to exchange data over a link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LinkName = Literal["rdma", "tcp", "wifi", "measured"]
BackendName = Literal["ring", "jaccl"]


@dataclass(frozen=True)
class LinkProfile:
    """Speed of a kind of link.

    Args:
        name: the user's name for it.
        backend: MLX's backend for it.
        hop_s: time of a small message to the next host, without the fence on the GPU.
        bytes_per_s: bandwidth in one direction.
        source: source of these numbers.
    """

    name: LinkName
    backend: BackendName
    hop_s: float
    bytes_per_s: float
    source: str

    def send_s(self, size: float) -> float:
        """Return the time of a message from one rank to the next."""
        return self.hop_s + size / self.bytes_per_s

    def all_gather_s(self, size: float, ranks: int) -> float:
        """Return the time of an all-gather of `size` bytes per rank: one hop in a mesh, N - 1 in a ring."""
        hops = 1 if self.backend == "jaccl" else ranks - 1
        return hops * self.hop_s + (ranks - 1) * size / self.bytes_per_s

    def all_reduce_s(self, size: float, ranks: int, gathers: bool) -> float:
        """Return the time of an all-reduce of `size` bytes.

        One hop in a mesh, 2 (N - 1) hops in a ring, unless an all-gather and a local sum are allowed and faster.
        """
        by_gather_s = self.all_gather_s(size, ranks)
        if self.backend == "jaccl":
            return by_gather_s
        on_ring_s = 2 * (ranks - 1) * (self.hop_s + size / ranks / self.bytes_per_s)
        return min(by_gather_s, on_ring_s) if gathers else on_ring_s


RDMA = LinkProfile(
    "rdma",
    "jaccl",
    28e-6,
    6.5e9,
    "omar-karray/mlx-jaccl-cluster: 25.5 us at 4 KB; gh:jundot/omlx#3118: 27 to 31 us, 6.1 to 6.5 GB/s",
)
TCP = LinkProfile(
    "tcp",
    "ring",
    150e-6,
    6.5e9,
    "300 us per round trip, so half of it one way (Geerling, Apple TN3205); 52 Gbit/s (gh:exo-explore/exo#2063)",
)
WIFI = LinkProfile("wifi", "ring", 2.5e-3, 50e6, "a guess: 5 ms per round trip, 50 MB/s")


def measured_link(round_trip_s: float, bytes_per_s: float) -> LinkProfile:
    """Return the profile of a network that the hosts have measured over TCP."""
    return LinkProfile("measured", "ring", round_trip_s / 2, bytes_per_s, "measured between the hosts")

"""How long ranks take to exchange something over a link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LinkName = Literal["rdma", "tcp", "wifi", "measured"]
BackendName = Literal["ring", "jaccl"]


@dataclass(frozen=True)
class LinkProfile:
    """A kind of link.

    Args:
        name: as the user calls it.
        backend: of MLX, that uses it.
        hop_s: for a small message from one host to the next, without the fence on the GPU.
        bytes_per_s: one way.
        source: of these figures.
    """

    name: LinkName
    backend: BackendName
    hop_s: float
    bytes_per_s: float
    source: str

    def hand_over_s(self, size: float) -> float:
        """For a message from one rank to the next."""
        return self.hop_s + size / self.bytes_per_s

    def gather_s(self, size: float, ranks: int) -> float:
        """For everybody to have everybody's `size` bytes: one hop in a mesh, N - 1 in a ring."""
        hops = 1 if self.backend == "jaccl" else ranks - 1
        return hops * self.hop_s + (ranks - 1) * size / self.bytes_per_s

    def sum_s(self, size: float, ranks: int, gathers: bool) -> float:
        """For a sum of `size` bytes: one hop in a mesh, 2 (N - 1) in a ring unless gathering and adding is faster."""
        gather_s = self.gather_s(size, ranks)
        if self.backend == "jaccl":
            return gather_s
        all_sum_s = 2 * (ranks - 1) * (self.hop_s + size / ranks / self.bytes_per_s)
        return min(gather_s, all_sum_s) if gathers else all_sum_s


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
    "300 us an exchange, so half of it one way (Geerling, Apple TN3205); 52 Gbit/s (gh:exo-explore/exo#2063)",
)
WIFI = LinkProfile("wifi", "ring", 2.5e-3, 50e6, "design.md: 5 ms and more there and back; the rate is a guess")


def measured_link(round_trip_s: float, bytes_per_s: float) -> LinkProfile:
    """A network that the hosts have measured between them, over TCP."""
    return LinkProfile("measured", "ring", round_trip_s / 2, bytes_per_s, "measured between the hosts")

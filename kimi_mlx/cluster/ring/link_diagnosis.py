"""Find the link that corrupts data, from the link tests of all ranks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_mlx.cluster.hosts.host import Cluster

Mismatch = Mapping[str, Any]
"""A payload that a rank received corrupted, as kimi_mlx.rank.link_test reports it."""

REMEDY = "the link or MLX corrupts data: try another cable or port, `--backend ring`, the newest MLX on all"
RING_REMEDY = "the link or MLX corrupts data: try another cable or port, another network, the newest MLX on all"


@dataclass(frozen=True)
class CorruptLink:
    """A link that corrupted data, or a rank that received corrupt data.

    Args:
        rank: rank that received the data.
        message: the ranks, the payload, and the number of corrupt values.
        hint: what may help.
    """

    rank: int
    message: str
    hint: str


def find_corrupt_links(cluster: Cluster, mismatches: Mapping[int, Sequence[Mismatch]]) -> list[CorruptLink]:
    """Return the corrupt links between two ranks, else the ranks that received corrupt data; empty if there are none.

    Only a message, and on a mesh a part of a gather, goes directly from one rank to another; everything else passes
    through several ranks.

    Args:
        cluster: the ranks.
        mismatches: rank -> payloads that it received corrupted.
    """
    direct = ("message", "gather") if cluster.backend == "jaccl" else ("message",)
    remedy = RING_REMEDY if cluster.backend == "ring" else REMEDY
    links: dict[frozenset[int], CorruptLink] = {}
    for rank in sorted(mismatches):
        for mismatch in mismatches[rank]:
            for source in mismatch["sources"] if mismatch["kind"] in direct else ():
                message = (
                    f"the link between {_both(cluster, source, rank)} corrupts data: {_name(cluster, rank)} received "
                    f"{mismatch['count']} of {mismatch['num_values']} values of the {mismatch['payload']} changed"
                )
                links.setdefault(frozenset((source, rank)), CorruptLink(rank, message, remedy))
    if links:
        return list(links.values())
    return [
        CorruptLink(rank, _describe_indirect(cluster, rank, of_rank), remedy)
        for rank, of_rank in sorted(mismatches.items())
        if of_rank
    ]


def _describe_indirect(cluster: Cluster, rank: int, mismatches: Sequence[Mismatch]) -> str:
    """Describe corrupt data that passed through several ranks: its sources, and the rank that sent it last."""
    before = f"from {_name(cluster, (rank - 1) % cluster.size)}" if cluster.backend == "ring" else "from its peers"
    sources = sorted({source for mismatch in mismatches for source in mismatch["sources"]})
    of = f"; parts of {', '.join(_name(cluster, source) for source in sources)}" if sources else ""
    first = mismatches[0]
    return (
        f"{_name(cluster, rank)} received {len(mismatches)} corrupt payloads; the first is the {first['payload']}: "
        f"{first['count']} of {first['num_values']} values changed; its data comes {before}{of}"
    )


def _both(cluster: Cluster, source: int, rank: int) -> str:
    return f"{_name(cluster, source)} and {_name(cluster, rank)}"


def _name(cluster: Cluster, rank: int) -> str:
    return f"rank {rank} (`{cluster.hostfile.hosts[rank].ssh}`)"

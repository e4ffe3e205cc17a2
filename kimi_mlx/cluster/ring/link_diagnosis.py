"""Which link is to blame for wrong data, from what all ranks say they got. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_mlx.cluster.hosts.host import Cluster

Wrong = Mapping[str, Any]
"""What a rank got wrong of a payload, as kimi_mlx.rank.link_test says it."""

REMEDY = "the link or MLX corrupts data: try another cable or port, `--backend ring`, the newest MLX on all"
RING_REMEDY = "the link or MLX corrupts data: try another cable or port, another network, the newest MLX on all"


@dataclass(frozen=True)
class CorruptLink:
    """Data that came otherwise than they were sent.

    Args:
        rank: that got them.
        message: between whom, and how much of what.
        hint: what may help.
    """

    rank: int
    message: str
    hint: str


def find_corrupt_links(cluster: Cluster, wrong: Mapping[int, Sequence[Wrong]]) -> list[CorruptLink]:
    """The links between two ranks that are to blame, else the ranks that got something wrong; empty if nobody did.

    A message goes from one rank to the next, and over a mesh so does a part of a gather; all else passes through
    several hands.

    Args:
        cluster: the ranks.
        wrong: rank -> what it got wrong.
    """
    direct = ("message", "gather") if cluster.backend == "jaccl" else ("message",)
    remedy = RING_REMEDY if cluster.backend == "ring" else REMEDY
    links: dict[frozenset[int], CorruptLink] = {}
    for rank in sorted(wrong):
        for each in wrong[rank]:
            for source in each["sources"] if each["kind"] in direct else ():
                message = (
                    f"the link between {_both(cluster, source, rank)} garbles data: {_name(cluster, rank)} got "
                    f"{each['count']} of {each['of']} values of the {each['payload']} otherwise than they were sent"
                )
                links.setdefault(frozenset((source, rank)), CorruptLink(rank, message, remedy))
    vague = [CorruptLink(rank, _vague(cluster, rank, wrong[rank]), remedy) for rank in sorted(wrong) if wrong[rank]]
    return list(links.values()) or vague


def _vague(cluster: Cluster, rank: int, wrong: Sequence[Wrong]) -> str:
    """Of what has come through other ranks: whose it was, and who handed it on."""
    before = f"from {_name(cluster, (rank - 1) % cluster.size)}" if cluster.backend == "ring" else "from its peers"
    sources = sorted({source for each in wrong for source in each["sources"]})
    of = f"; parts of {', '.join(_name(cluster, source) for source in sources)}" if sources else ""
    first = wrong[0]
    return (
        f"{_name(cluster, rank)} got wrong results of {len(wrong)} payloads; first, the {first['payload']}: "
        f"{first['count']} of {first['of']} values; its data come {before}{of}"
    )


def _both(cluster: Cluster, source: int, rank: int) -> str:
    return f"{_name(cluster, source)} and {_name(cluster, rank)}"


def _name(cluster: Cluster, rank: int) -> str:
    return f"rank {rank} (`{cluster.hostfile.hosts[rank].ssh}`)"

"""Tags of expert records: which expert a record holds.

A tag is the last bytes of a record. Each read checks it, so that a file which was truncated, swapped with another one,
or never written completely is an error, and not a wrong answer.

    0   8 bytes   MAGIC
    8   4 bytes   number of the expert, little-endian
    12  2 bytes   layer
    14  2 bytes   rank
    16  8 bytes   digest of the placement, padded with zeros
    24  40 bytes  commit
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

TAG_BYTES = 64

MAGIC = b"kimi-exp"

_TAG = struct.Struct("<8sIHH8s40s")


@dataclass(frozen=True)
class ExpertTag:
    """The tags of the records of one layer on one rank.

    Args:
        layer: number of the layer.
        rank: number of the rank.
        placement: digest of the placement.
        commit: commit of the weights.
    """

    layer: int
    rank: int
    placement: str
    commit: str

    def to_bytes(self, expert: int) -> bytes:
        """Return the tag of an expert: TAG_BYTES bytes."""
        placement, commit = self.placement.encode(), self.commit.encode()[:40]
        return _TAG.pack(MAGIC, expert, self.layer, self.rank, placement, commit)


def describe_tag(data: bytes) -> str:
    """Return a description of a tag for messages, such as `expert 3 of layer 7 of rank 0`."""
    magic, expert, layer, rank, placement, commit = _TAG.unpack(data)
    if magic != MAGIC:
        return "no expert"
    names = (placement.rstrip(b"\0").decode("ascii", "replace"), commit.rstrip(b"\0").decode("ascii", "replace"))
    return f"expert {expert} of layer {layer} of rank {rank} (placement {names[0]}, commit {names[1]})"

"""Which link is blamed for wrong data."""

from __future__ import annotations

import re

import pytest

from kimi_mlx.cluster.hosts.host import Backend, Cluster, Host, Hostfile
from kimi_mlx.cluster.ring.link_diagnosis import find_corrupt_links

HOSTS = Hostfile(tuple(Host(name) for name in ("mac-a", "mac-b", "mac-c")))


def cluster(backend: Backend = "ring") -> Cluster:
    return Cluster(HOSTS, backend, {})


def wrong(kind: str, *sources: int) -> dict[str, object]:
    payload = f"{kind} of 128 tokens, float32"
    return {"payload": payload, "kind": kind, "count": 3, "of": 1024, "sources": list(sources)}


def test_nobody_is_blamed_where_all_is_right() -> None:
    assert find_corrupt_links(cluster(), {0: [], 1: [], 2: []}) == []


def test_a_wrong_message_names_the_two_ends_once() -> None:
    said = {0: [wrong("sum")], 1: [wrong("gather", 0, 2), wrong("message", 2)], 2: [wrong("message", 1)]}
    [found] = find_corrupt_links(cluster(), said)
    assert found.message == (
        "the link between rank 2 (`mac-c`) and rank 1 (`mac-b`) corrupts data: rank 1 (`mac-b`) received "
        "3 of 1024 values of the message of 128 tokens, float32 changed"
    )
    assert found.rank == 1
    assert "another cable" in found.hint


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("ring", "rank 0 (`mac-a`) received 1 corrupt payloads; .*; its data comes from rank 2 .*; parts of rank 1"),
        ("jaccl-ring", "rank 0 .* its data comes from its peers; parts of rank 1"),
        ("jaccl", "the link between rank 1 .* and rank 0 .* corrupts data"),
    ],
)
def test_a_wrong_gather_names_a_link_where_it_has_come_straight(backend: Backend, message: str) -> None:
    [found] = find_corrupt_links(cluster(backend), {0: [wrong("gather", 1)], 1: [], 2: []})
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    assert re.search(pattern, found.message)
    assert ("--backend ring" in found.hint) == (backend != "ring")

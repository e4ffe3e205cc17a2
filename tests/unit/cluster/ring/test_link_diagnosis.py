"""Find the link that corrupts data."""

from __future__ import annotations

import re

import pytest

from kimi_mlx.cluster.hosts.host import Backend, Cluster, Host, Hostfile
from kimi_mlx.cluster.ring.link_diagnosis import find_corrupt_links

HOSTS = Hostfile(tuple(Host(name) for name in ("mac-a", "mac-b", "mac-c")))


def make_cluster(backend: Backend = "ring") -> Cluster:
    return Cluster(HOSTS, backend, {})


def mismatch(kind: str, *sources: int) -> dict[str, object]:
    payload = f"{kind} of 128 tokens, float32"
    return {"payload": payload, "kind": kind, "count": 3, "num_values": 1024, "sources": list(sources)}


def test_no_link_is_reported_without_mismatches() -> None:
    assert find_corrupt_links(make_cluster(), {0: [], 1: [], 2: []}) == []


def test_corrupt_message_names_both_ends_once() -> None:
    mismatches = {
        0: [mismatch("sum")],
        1: [mismatch("gather", 0, 2), mismatch("message", 2)],
        2: [mismatch("message", 1)],
    }
    [diagnosis] = find_corrupt_links(make_cluster(), mismatches)
    assert diagnosis.message == (
        "the link between rank 2 (`mac-c`) and rank 1 (`mac-b`) corrupts data: rank 1 (`mac-b`) received "
        "3 of 1024 values of the message of 128 tokens, float32 changed"
    )
    assert diagnosis.rank == 1
    assert "another cable" in diagnosis.hint


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("ring", "rank 0 (`mac-a`) received 1 corrupt payloads; .*; its data comes from rank 2 .*; parts of rank 1"),
        ("jaccl-ring", "rank 0 .* its data comes from its peers; parts of rank 1"),
        ("jaccl", "the link between rank 1 .* and rank 0 .* corrupts data"),
    ],
)
def test_corrupt_gather_names_a_link_only_if_sent_directly(backend: Backend, message: str) -> None:
    [diagnosis] = find_corrupt_links(make_cluster(backend), {0: [mismatch("gather", 1)], 1: [], 2: []})
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    assert re.search(pattern, diagnosis.message)
    assert ("--backend ring" in diagnosis.hint) == (backend != "ring")

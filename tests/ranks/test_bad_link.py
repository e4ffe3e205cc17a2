"""A link that corrupts data is found and named at the start of a ring, and by the doctor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from kimi_mlx.cluster.doctor.payloads import quick_payloads
from kimi_mlx.cluster.doctor.self_test import MODULE, self_test
from kimi_mlx.cluster.hosts.host import Cluster, local_cluster
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.errors import RingError
from tests.ranks.test_ring import wait_until_gone
from tests.relay import corrupting_relay

pytestmark = pytest.mark.ranks

EVERY_BYTES = 50_000
"""Number of bytes after which the relay flips a bit."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def cluster_with_relay(size: int, corrupted: int, every: int, stack: ExitStack) -> Cluster:
    """Return local ranks, one of which reaches the next one through a relay.

    Args:
        size: number of ranks.
        corrupted: rank whose data to the next rank go through the relay.
        every: number of bytes after which a bit is flipped; 0 flips none.
        stack: exit stack that closes the relay.
    """
    following = (corrupted + 1) % size

    def rewrite(file: str) -> list[str]:
        hosts: list[list[str]] = json.loads(file)
        relay = stack.enter_context(corrupting_relay(int(hosts[following][0].rpartition(":")[2]), every))
        changed = [*hosts[:following], [f"127.0.0.1:{relay}"], *hosts[following + 1 :]]
        return [json.dumps(changed if rank == corrupted else hosts) for rank in range(size)]

    return replace(local_cluster(size), hostfile_rewriter=rewrite)


@pytest.mark.slow
@pytest.mark.parametrize(("corrupted", "size"), [(0, 2), pytest.param(1, 3, marks=pytest.mark.sweep)])
def test_the_error_at_start_names_the_link_that_corrupts_data(corrupted: int, size: int, stack: ExitStack) -> None:
    ring = Ring(cluster_with_relay(size, corrupted, EVERY_BYTES, stack), module=MODULE)
    with pytest.raises(RingError) as raised:
        ring.start(payloads=[], hidden_size=128)
    named = (
        rf"the link between rank {corrupted} \(`localhost`\) and rank {corrupted + 1} \(`localhost`\) corrupts data: "
    )
    assert raised.match(f"^{named}rank {corrupted + 1} .* received [1-9].* of .* values of the message of ")
    assert raised.value.rank == corrupted + 1
    assert "another cable" in (raised.value.hint or "")
    wait_until_gone(ring.pids, 1)


@pytest.mark.slow
def test_the_doctor_reports_the_link_in_a_finding(stack: ExitStack) -> None:
    result = self_test(cluster_with_relay(2, 0, EVERY_BYTES, stack), quick_payloads(), 128)
    [finding] = result.findings
    assert (finding.check, finding.state, result.is_stalled) == ("self-test", "problem", False)
    assert "the link between rank 0 (`localhost`) and rank 1 (`localhost`) corrupts data" in finding.message


@pytest.mark.slow
def test_a_relay_that_corrupts_nothing_is_fine(stack: ExitStack) -> None:
    payloads = [payload for payload in quick_payloads() if payload.kind != "message"]
    result = self_test(cluster_with_relay(2, 0, 0, stack), payloads, 128)
    assert [finding.state for finding in result.findings] == ["ok"]
    assert result.sums is not None
    sizes = [timing.size_bytes for timing in result.sums.timings]  # a busy machine may not measure all sizes
    assert sizes == [512, 4096, 32768, 262144][: len(sizes)] != []

"""A link that corrupts data is found and named at the start of a ring, and by the doctor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from kimi_mlx.cluster.doctor import self_test as self_test_module
from kimi_mlx.cluster.doctor.payloads import quick_payloads
from kimi_mlx.cluster.doctor.self_test import self_test
from kimi_mlx.cluster.hosts.host import Hostfile, local_cluster
from kimi_mlx.cluster.ring import ring as ring_module
from kimi_mlx.cluster.ring.backends import ring_hosts
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.errors import RingError
from tests.cluster.hosts import ROOT
from tests.ranks.test_ring import wait_until_gone
from tests.relay import corrupting_relay

pytestmark = pytest.mark.ranks

MODULE = "rank_behind_a_relay"
PROGRAM = """
import json
from kimi_mlx.rank import rendezvous
from kimi_mlx.rank.self_test import main

init_group = rendezvous.init_group


def init_group_of_own_file(ring, rank):
    return init_group({**ring, "file": json.dumps(json.loads(ring["file"])[rank])}, rank)


rendezvous.init_group = init_group_of_own_file
"""
"""Rank program that uses its own hostfile out of a list, so that one rank can reach its neighbour through a relay."""

EVERY_BYTES = 50_000
"""Number of bytes after which the relay flips a bit."""


class RelayHostfiles:
    """Replaces backend_file: a hostfile for each rank, in which one rank reaches its next neighbour through a relay.

    Args:
        corrupted: rank whose data to the next rank go through the relay.
        every: number of bytes after which a bit is flipped; 0 flips none.
        stack: exit stack that closes the relays.
    """

    def __init__(self, corrupted: int, every: int, stack: ExitStack):
        self._corrupted, self._every, self._stack = corrupted, every, stack

    def __call__(self, hostfile: Hostfile, backend: str, ports: Sequence[int]) -> str:
        hosts = ring_hosts(hostfile, ports)
        following = (self._corrupted + 1) % len(hosts)
        relay = self._stack.enter_context(corrupting_relay(ports[following], self._every))
        files = [[list(host) for host in hosts] for _ in hosts]
        files[self._corrupted][following] = [f"127.0.0.1:{relay}"]
        return json.dumps(files)


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    (tmp_path / f"{MODULE}.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(("corrupted", "size"), [(0, 2), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_the_error_at_start_names_the_link_that_corrupts_data(
    corrupted: int, size: int, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_module, "backend_file", RelayHostfiles(corrupted, EVERY_BYTES, stack))
    ring = Ring(local_cluster(size), module=MODULE)
    with pytest.raises(RingError) as raised:
        ring.start(payloads=[], hidden_size=128)
    named = (
        rf"the link between rank {corrupted} \(`localhost`\) and rank {corrupted + 1} \(`localhost`\) corrupts data: "
    )
    assert raised.match(f"^{named}rank {corrupted + 1} .* received [1-9].* of .* values of the message of ")
    assert raised.value.rank == corrupted + 1
    assert "another cable" in (raised.value.hint or "")
    wait_until_gone(ring.pids, 1)


def test_the_doctor_reports_the_link_in_a_finding(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "backend_file", RelayHostfiles(0, EVERY_BYTES, stack))
    monkeypatch.setattr(self_test_module, "MODULE", MODULE)
    result = self_test(local_cluster(2), quick_payloads(), 128)
    [finding] = result.findings
    assert (finding.check, finding.state, result.is_stalled) == ("self-test", "problem", False)
    assert "the link between rank 0 (`localhost`) and rank 1 (`localhost`) corrupts data" in finding.message


def test_a_relay_that_corrupts_nothing_is_fine(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "backend_file", RelayHostfiles(0, 0, stack))
    monkeypatch.setattr(self_test_module, "MODULE", MODULE)
    payloads = [payload for payload in quick_payloads() if payload.kind != "message"]
    result = self_test(local_cluster(2), payloads, 128)
    assert [finding.state for finding in result.findings] == ["ok"]
    assert result.sums is not None
    sizes = [timing.size_bytes for timing in result.sums.timings]  # a busy machine may not measure all sizes
    assert sizes == [512, 4096, 32768, 262144][: len(sizes)] != []

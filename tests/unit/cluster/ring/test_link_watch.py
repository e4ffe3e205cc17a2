"""The two ends of a link receive each other's heartbeats, and no others."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from kimi_mlx.cluster.ring import link_watch
from kimi_mlx.cluster.ring.link_watch import LinkWatch

ADDRESSES = ("127.0.0.1", "127.0.0.2")
HEARTBEAT_S = 0.05

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is a local address only on Linux")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LinkWatch]]:
    monkeypatch.setattr(link_watch, "HEARTBEAT_S", HEARTBEAT_S)
    ends = [LinkWatch(address) for address in ADDRESSES]
    yield ends
    for end in ends:
        end._socket.close()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def peer_address(ends: list[LinkWatch], rank: int) -> dict[int, tuple[str, int]]:
    return {rank: (ADDRESSES[rank], ends[rank].port)}


def test_heartbeats_arrive_until_one_end_closes(ends: list[LinkWatch]) -> None:
    assert ends[0].ages() == {}
    ends[0].start(b"token", peer_address(ends, 1))
    time.sleep(4 * HEARTBEAT_S)
    assert ends[0].ages() == {}  # it sends, but without an answer the link is not watched
    ends[1].start(b"token", peer_address(ends, 0))
    wait_until(lambda: 1 in ends[0].ages() and 0 in ends[1].ages())
    end = time.monotonic() + 10 * HEARTBEAT_S
    while time.monotonic() < end:
        assert ends[0].ages()[1] < 5
    ends[1]._socket.close()
    wait_until(lambda: ends[0].ages()[1] > 10 * HEARTBEAT_S)


def test_other_tokens_and_other_ports_are_ignored(ends: list[LinkWatch]) -> None:
    ends[0].start(b"token", peer_address(ends, 1))
    ends[1].start(b"another", peer_address(ends, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind((ADDRESSES[1], 0))
        for _ in range(10):
            stranger.sendto(b"token", (ADDRESSES[0], ends[0].port))
            time.sleep(HEARTBEAT_S)
    assert ends[0].ages() == {}
    assert ends[1].ages() == {}


def test_token_is_never_sent_and_a_recorded_heartbeat_is_refused(ends: list[LinkWatch]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind((ADDRESSES[1], 0))
        peer.settimeout(10)
        ends[0].start(b"token", {1: peer.getsockname()})
        first, address = peer.recvfrom(256)
        assert b"token" not in first
        assert address == (ADDRESSES[0], ends[0].port)
        peer.sendto(first, address)  # authentic, but in the other direction
        valid = link_watch._heartbeat(b"token", 5, peer.getsockname(), address)
        time.sleep(4 * HEARTBEAT_S)
        assert ends[0].ages() == {}
        peer.sendto(valid, address)
        wait_until(lambda: 1 in ends[0].ages())
        received_at = ends[0]._received_at[1]
        for _ in range(5):
            peer.sendto(valid, address)
            time.sleep(HEARTBEAT_S)
        assert ends[0]._received_at[1] == received_at


def test_address_of_another_machine(ends: list[LinkWatch]) -> None:
    with pytest.raises(OSError, match="assign requested address"):
        LinkWatch("192.0.2.1")

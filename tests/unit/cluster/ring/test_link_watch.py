"""Two ends of a link hear each other, and only each other."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from kimi_mlx.cluster.ring import link_watch
from kimi_mlx.cluster.ring.link_watch import LinkWatch

ADDRESSES = ("127.0.0.1", "127.0.0.2")
BEAT_S = 0.05

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux alone")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LinkWatch]]:
    monkeypatch.setattr(link_watch, "HEARTBEAT_S", BEAT_S)
    ends = [LinkWatch(address) for address in ADDRESSES]
    yield ends
    for end in ends:
        end._socket.close()


def wait(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def place(ends: list[LinkWatch], rank: int) -> dict[int, tuple[str, int]]:
    return {rank: (ADDRESSES[rank], ends[rank].port)}


def test_they_hear_each_other_until_one_falls_silent(ends: list[LinkWatch]) -> None:
    assert ends[0].ages() == {}
    ends[0].start(b"word", place(ends, 1))
    time.sleep(4 * BEAT_S)
    assert ends[0].ages() == {}  # it talks, but nobody answers: not watched
    ends[1].start(b"word", place(ends, 0))
    wait(lambda: 1 in ends[0].ages() and 0 in ends[1].ages())
    end = time.monotonic() + 10 * BEAT_S
    while time.monotonic() < end:
        assert ends[0].ages()[1] < 5
    ends[1]._socket.close()
    wait(lambda: ends[0].ages()[1] > 10 * BEAT_S)


def test_another_word_or_another_place_is_not_heard(ends: list[LinkWatch]) -> None:
    ends[0].start(b"word", place(ends, 1))
    ends[1].start(b"another", place(ends, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind((ADDRESSES[1], 0))
        for _ in range(10):
            stranger.sendto(b"word", (ADDRESSES[0], ends[0].port))
            time.sleep(BEAT_S)
    assert ends[0].ages() == {}
    assert ends[1].ages() == {}


def test_an_address_of_another_machine(ends: list[LinkWatch]) -> None:
    with pytest.raises(OSError, match="assign requested address"):
        LinkWatch("192.0.2.1")

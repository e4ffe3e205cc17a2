"""The relay of --link-delay-ms: round trips take twice the delay, and chunks do not wait for each other."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kimi_mlx.bench.slow_link import ring_views, slow_links

DELAY_MS = 40


@pytest.fixture
def echo() -> Iterator[str]:
    """Yield the address of an echo server."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            near, _ = server.accept()
            with near:
                while data := near.recv(1 << 16):
                    near.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def relay_to(address: str, views: list[str]) -> tuple[str, int]:
    """Return the address of rank 1 in the hostfile of rank 0."""
    host, _, port = json.loads(views[0])[1][0].rpartition(":")
    assert f"{host}:{port}" != address
    return host, int(port)


def test_a_round_trip_takes_twice_the_delay_and_chunks_overlap(echo: str) -> None:
    with slow_links(DELAY_MS) as rewrite_hostfile:
        views = rewrite_hostfile(json.dumps([["127.0.0.1:1"], [echo]]))
        with socket.create_connection(relay_to(echo, views)) as near:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            near.sendall(b"first")  # the connection is established
            near.recv(8)
            times: list[float] = []
            for _ in range(5):
                start = time.perf_counter()
                near.sendall(b"ping")
                assert near.recv(8) == b"ping"
                times.append(time.perf_counter() - start)
            assert min(times) >= 2 * DELAY_MS / 1000
            assert min(times) < 4 * DELAY_MS / 1000
            bursts: list[float] = []
            while len(bursts) < 5 and min(bursts, default=1.0) >= 10 * DELAY_MS / 1000:  # the machine may be busy
                start = time.perf_counter()
                for _ in range(10):  # in flight at the same time: the relay adds latency, but keeps the bandwidth
                    near.sendall(b"x")
                    time.sleep(0.002)
                remaining = 10
                while remaining:
                    remaining -= len(near.recv(10))
                bursts.append(time.perf_counter() - start)
            assert min(bursts) < 10 * DELAY_MS / 1000  # sequential chunks would take 20 times the delay
            near.shutdown(socket.SHUT_WR)
            assert near.recv(1) == b""


def test_a_rank_may_start_to_listen_later() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with slow_links(0) as rewrite_hostfile:
            near = socket.create_connection(relay_to(address, rewrite_hostfile(f'[["a:1"],["{address}"]]')))
            time.sleep(0.2)
            server.listen()
            server.settimeout(5)
            far = server.accept()[0]
            with near, far:
                near.sendall(b"hello")
                assert far.recv(5, socket.MSG_WAITALL) == b"hello"


def test_each_rank_keeps_its_own_address_and_sees_the_next_at_the_relay() -> None:
    views = ring_views([["a:1"], ["b:2"], ["c:3"]], [["r:1"], ["r:2"], ["r:3"]])
    assert [json.loads(view) for view in views] == [
        [["a:1"], ["r:2"], ["c:3"]],
        [["a:1"], ["b:2"], ["r:3"]],
        [["r:1"], ["b:2"], ["c:3"]],
    ]

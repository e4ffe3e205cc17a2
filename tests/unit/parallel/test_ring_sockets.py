"""The ring's sockets are found by their addresses, and a broken-off collective gets data without its peer."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from kimi_mlx.parallel.ring_sockets import abort_collectives, find_ring_sockets

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect(stack: ExitStack) -> tuple[str, Pair]:
    """Return a listening address, and the two ends of a connection: who connected, who accepted."""
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    client = stack.enter_context(socket.create_connection(server.getsockname()))
    accepted = stack.enter_context(server.accept()[0])
    host, port = server.getsockname()
    return f"{host}:{port}", (client, accepted)


def test_only_the_connections_of_the_ring_are_found(stack: ExitStack) -> None:
    first, (to_first, at_first) = connect(stack)
    second, (to_second, at_second) = connect(stack)
    connect(stack)  # something else that was opened at the same time
    stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    found = find_ring_sockets([[first], [second]], 0)
    # Both ranks are in this process, so each sees both ends.
    assert (
        {at_first.fileno(), to_second.fileno()}
        <= set(found)
        <= {end.fileno() for end in (to_first, at_first, to_second, at_second)}
    )
    assert find_ring_sockets([["127.0.0.1:1"], ["127.0.0.1:2"]], 0) == []


def test_several_connections_of_a_neighbour_are_found(stack: ExitStack) -> None:
    pairs = [connect(stack) for _ in range(2)]
    hosts = [["127.0.0.1:1", "127.0.0.1:2"], [address for address, _ in pairs]]
    assert find_ring_sockets(hosts, 0) == sorted(client.fileno() for _, (client, _) in pairs)


def test_an_aborted_socket_delivers_and_takes_everything_and_its_peer_sees_nothing(
    stack: ExitStack,
) -> None:
    _, (client, accepted) = connect(stack)
    abort_collectives([client.fileno()])
    number = client.fileno()
    received = sent = 0
    while received < 3_000_000 or sent < 3_000_000:  # as MLX's thread does: without waiting
        with suppress(BlockingIOError):
            data = os.read(number, 1 << 16)
            assert data.count(0) == len(data) > 0
            received += len(data)
        with suppress(BlockingIOError):
            sent += os.write(number, b"x" * (1 << 16))
    accepted.settimeout(0.1)
    with pytest.raises(TimeoutError):
        accepted.recv(1)

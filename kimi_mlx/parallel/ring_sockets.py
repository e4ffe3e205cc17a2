"""The sockets of MLX's ring in this process: find them, and abort collectives that wait for a lost rank.

MLX's ring (0.32) has no way to abort a collective. If one of its sockets fails, the thread of that socket ends: the
pending operation fails, and all later ones of the same step wait forever. So the sockets must not fail. Instead, each
is replaced by a local one that accepts everything and delivers zeros, until all collectives have returned.
"""

from __future__ import annotations

import os
import selectors
import socket
import stat
import threading
from collections.abc import Iterable, Sequence

CHUNK_BYTES = 1 << 20

Address = tuple[str, int]


def find_ring_sockets(hosts: Sequence[Sequence[str]], rank: int) -> list[int]:
    """Return the file descriptors of the connections of MLX's ring to both neighbours.

    Args:
        hosts: `address:port` strings of each rank, as in MLX's hostfile.
        rank: own rank. The previous rank has connected to its addresses, and it has connected to those of the next.
    """
    return find_connections(hosts[rank], hosts[(rank + 1) % len(hosts)])


def find_connections(own: Iterable[str], peers: Iterable[str]) -> list[int]:
    """Return the file descriptors of TCP connections of this process, by their addresses.

    Args:
        own: `address:port` strings; their connections are found by this process's own end.
        peers: `address:port` strings; their connections are found by the peer's end.
    """
    own_addresses, peer_addresses = _resolve(own), _resolve(peers)
    ends = {fd: _ends_of(fd) for fd in map(int, os.listdir("/dev/fd"))}
    return sorted(fd for fd, pair in ends.items() if pair and (pair[0] in own_addresses or pair[1] in peer_addresses))


def abort_collectives(sockets: Iterable[int]) -> None:
    """Make all collectives of this process return, now and later, with invalid data.

    The connections stay open, so that the neighbours do not see them fail.

    Args:
        sockets: file descriptors from find_ring_sockets().
    """
    selector = selectors.DefaultSelector()
    for fd in sockets:
        os.dup(fd)  # stays open until this process ends
        theirs, ours = socket.socketpair()
        for end in (theirs, ours):
            end.setblocking(False)
        os.dup2(theirs.fileno(), fd)
        theirs.close()
        selector.register(ours, selectors.EVENT_READ | selectors.EVENT_WRITE)
    threading.Thread(target=_serve_zeros, args=(selector,), daemon=True).start()


def _serve_zeros(selector: selectors.BaseSelector) -> None:
    zeros = bytes(CHUNK_BYTES)
    while selector.get_map():
        for key, events in selector.select():
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                if events & selectors.EVENT_WRITE:
                    connection.send(zeros)
                if events & selectors.EVENT_READ:
                    connection.recv(CHUNK_BYTES)
            except BlockingIOError:
                continue
            except OSError:  # MLX has closed its end
                selector.unregister(connection)
                connection.close()


def _resolve(addresses: Iterable[str]) -> set[Address]:
    pairs = (address.rsplit(":", 1) for address in addresses)
    socket_addresses = [
        socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4] for host, port in pairs
    ]
    return {(str(address[0]), int(address[1])) for address in socket_addresses}


def _ends_of(fd: int) -> tuple[Address, Address] | None:
    """Return the own and the peer's address of a TCP connection; None for any other file descriptor."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        with socket.socket(fileno=os.dup(fd)) as connection:
            if connection.family != socket.AF_INET:
                return None
            return connection.getsockname(), connection.getpeername()
    except OSError:  # closed meanwhile, or a listening socket
        return None

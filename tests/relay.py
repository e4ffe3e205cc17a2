"""A relay between two ranks on loopback that corrupts data on its way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def corrupting_relay(port: int, every: int) -> Iterator[int]:
    """Yield a port that forwards to `port` of 127.0.0.1, and flip a bit in every `every`-th byte sent there.

    The target need not listen before the first connection.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve, args=(server, port, every), daemon=True).start()
        yield server.getsockname()[1]


def _serve(server: socket.socket, port: int, every: int) -> None:
    while True:
        try:
            near, _ = server.accept()
            far = socket.create_connection(("127.0.0.1", port))
        except OSError:  # closed; or the target does not listen yet, and MLX retries
            if server.fileno() < 0:
                return
            continue
        threading.Thread(target=_forward, args=(near, far, every), daemon=True).start()
        threading.Thread(target=_forward, args=(far, near, 0), daemon=True).start()


def _forward(source: socket.socket, target: socket.socket, every: int) -> None:
    done = 0
    with source, target:
        try:
            while data := bytearray(source.recv(1 << 16)):
                if every:
                    for position in range(-done % every, len(data), every):
                        data[position] ^= 1
                done += len(data)
                target.sendall(data)
        except OSError:  # one end has closed
            return

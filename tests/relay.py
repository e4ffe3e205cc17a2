"""A cable between two ranks on loopback that garbles what goes through it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbling_relay(port: int, every: int) -> Iterator[int]:
    """A port that leads to `port` of 127.0.0.1, and turns over a bit in every so many bytes that go there.

    Whoever is reached need not listen yet when the relay starts, but when the first connection comes.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve, args=(server, port, every), daemon=True).start()
        yield server.getsockname()[1]


def _serve(server: socket.socket, port: int, every: int) -> None:
    while True:
        try:
            near, _ = server.accept()
            far = socket.create_connection(("127.0.0.1", port))
        except OSError:  # closed; or nobody is there yet, and MLX tries again
            if server.fileno() < 0:
                return
            continue
        threading.Thread(target=_carry, args=(near, far, every), daemon=True).start()
        threading.Thread(target=_carry, args=(far, near, 0), daemon=True).start()


def _carry(source: socket.socket, target: socket.socket, every: int) -> None:
    done = 0
    with source, target:
        try:
            while data := bytearray(source.recv(1 << 16)):
                if every:
                    for place in range(-done % every, len(data), every):
                        data[place] ^= 1
                done += len(data)
                target.sendall(data)
        except OSError:  # an end is gone
            return

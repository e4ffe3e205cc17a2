"""Watch the links between neighbours of a ring with a UDP heartbeat per second, next to MLX's own connections.

MLX waits forever for a peer whose cable was pulled; the heartbeat distinguishes that from slow work. A neighbour whose
heartbeat never arrived (a firewall that blocks UDP) is not watched.

A heartbeat is an increasing number of 8 bytes, and an HMAC-SHA256 of it and of both addresses, with the ring's token as
the key: the token itself is never sent over the link, and a recorded heartbeat is not accepted again.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import socket
import threading
import time
from collections.abc import Mapping

from kimi_mlx.cluster.channel.messages import HEARTBEAT_S

NUMBER_BYTES = 8
"""Size of a heartbeat's number."""


class LinkWatch:
    """The heartbeats of one rank.

    Args:
        address: the rank's own address in the network of the ring.

    Raises:
        OSError: the address does not belong to this host.
    """

    def __init__(self, address: str):
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind((address, 0))
        except OSError:
            self._socket.close()
            raise
        self._received_at: dict[int, float] = {}

    @property
    def port(self) -> int:
        """UDP port to which neighbours send."""
        return self._socket.getsockname()[1]

    def start(self, ring_token: bytes, neighbours: Mapping[int, tuple[str, int]]) -> None:
        """Start the threads that send and receive heartbeats.

        Args:
            ring_token: key of the heartbeats, known only to this ring.
            neighbours: rank -> address and port.
        """
        threading.Thread(target=self._send_heartbeats, args=(ring_token, neighbours), daemon=True).start()
        threading.Thread(target=self._receive_heartbeats, args=(ring_token, neighbours), daemon=True).start()

    def ages(self) -> dict[int, float]:
        """Return the seconds since the last heartbeat of each rank from which one has arrived."""
        now = time.monotonic()
        return {rank: now - received_at for rank, received_at in self._received_at.copy().items()}

    def _send_heartbeats(self, ring_token: bytes, neighbours: Mapping[int, tuple[str, int]]) -> None:
        own_address = self._socket.getsockname()
        for number in itertools.count(1):
            for address in neighbours.values():
                with contextlib.suppress(OSError):  # no route: the neighbour misses the heartbeat
                    self._socket.sendto(_heartbeat(ring_token, number, own_address, address), address)
            time.sleep(HEARTBEAT_S)

    def _receive_heartbeats(self, ring_token: bytes, neighbours: Mapping[int, tuple[str, int]]) -> None:
        ranks = {address: rank for rank, address in neighbours.items()}
        own_address = self._socket.getsockname()
        last_numbers = dict.fromkeys(ranks, 0)
        while True:
            try:
                data, address = self._socket.recvfrom(256)
            except OSError:  # a neighbour closed its port: it is ending
                time.sleep(HEARTBEAT_S)
                continue
            number = int.from_bytes(data[:NUMBER_BYTES], "big")
            if address not in ranks or number <= last_numbers[address]:
                continue
            if hmac.compare_digest(data, _heartbeat(ring_token, number, address, own_address)):
                last_numbers[address] = number
                self._received_at[ranks[address]] = time.monotonic()


def _heartbeat(ring_token: bytes, number: int, sender: tuple[str, int], receiver: tuple[str, int]) -> bytes:
    count = number.to_bytes(NUMBER_BYTES, "big")
    addresses = f" {sender[0]}:{sender[1]} {receiver[0]}:{receiver[1]}".encode()
    return count + hmac.digest(ring_token, count + addresses, "sha256")

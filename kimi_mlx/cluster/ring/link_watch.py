"""Whether the network between neighbours of a ring is alive: a word a second over UDP, beside MLX's own connections.

MLX waits for ever for a peer whose cable was pulled; this tells it from work that takes its time. A neighbour that was
never heard (a firewall for UDP) is not watched.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Mapping

from kimi_mlx.cluster.channel.messages import HEARTBEAT_S


class LinkWatch:
    """A rank's end.

    Args:
        address: the rank's own, of the network that the ring uses.

    Raises:
        OSError: it is not an address of this host.
    """

    def __init__(self, address: str):
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind((address, 0))
        except OSError:
            self._socket.close()
            raise
        self._heard: dict[int, float] = {}

    @property
    def port(self) -> int:
        """Where neighbours send to."""
        return self._socket.getsockname()[1]

    def start(self, word: bytes, neighbours: Mapping[int, tuple[str, int]]) -> None:
        """Talk to the neighbours and listen to them, in threads.

        Args:
            word: what all of this ring say, and nobody else.
            neighbours: rank -> address and port.
        """
        threading.Thread(target=self._talk, args=(word, neighbours), daemon=True).start()
        threading.Thread(target=self._listen, args=(word, neighbours), daemon=True).start()

    def ages(self) -> dict[int, float]:
        """Rank -> seconds since it was heard, of those that were."""
        now = time.monotonic()
        return {rank: now - heard for rank, heard in self._heard.copy().items()}

    def _talk(self, word: bytes, neighbours: Mapping[int, tuple[str, int]]) -> None:
        while True:
            for place in neighbours.values():
                with contextlib.suppress(OSError):  # no route now: the other end will miss it
                    self._socket.sendto(word, place)
            time.sleep(HEARTBEAT_S)

    def _listen(self, word: bytes, neighbours: Mapping[int, tuple[str, int]]) -> None:
        ranks = {place: rank for rank, place in neighbours.items()}
        while True:
            try:
                data, place = self._socket.recvfrom(256)
            except OSError:  # a neighbour's port is closed: it is ending
                time.sleep(HEARTBEAT_S)
                continue
            if data == word and place in ranks:
                self._heard[ranks[place]] = time.monotonic()

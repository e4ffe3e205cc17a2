"""A rank's connection to its guard (kimi_mlx.cluster.ring.guard)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

from kimi_mlx.cluster.ring.guard import GUARD_VARIABLE


class GuardSocket:
    """Sends the guard the time that the end of this process may take, and copies of the ring's sockets.

    Without a guard, it does nothing.
    """

    def __init__(self) -> None:
        number = os.environ.pop(GUARD_VARIABLE, None)
        self._socket = None if number is None else socket.socket(fileno=int(number))

    def set_end_limit(self, seconds: float) -> None:
        """Set the time that this process may need to end, from now or from the end of its input."""
        self._send(f"{seconds}\n".encode(), ())

    def hold(self, sockets: Sequence[int]) -> None:
        """Let the guard keep these sockets open for a while if this process is lost."""
        if sockets:
            self._send(b"\n", sockets)

    def _send(self, line: bytes, sockets: Sequence[int]) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the guard is gone
                socket.send_fds(self._socket, [line], list(sockets))

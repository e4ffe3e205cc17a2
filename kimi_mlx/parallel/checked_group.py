"""A group for work of hours: a host that is lost is noticed, and what it did not send is not taken for data.

When MLX's ring loses a peer (seen in 0.32), a gather may return what happens to be in memory, and later ones never
return. So each row carries its number and its checksum, gathers run in a thread that can be left behind, and MLX's own
connections are looked at while we wait.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from zlib import crc32

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.parallel.group import Group, MlxGroup

SEAL_BYTES = 16
LOOK_S = 0.5
"""How often to look at the connections."""

GRACE_S = 2.0
"""For an answer that is already here when a connection ends: who is done earlier leaves earlier."""

SILENCE_LIMIT_S = 1800.0
"""How long the others may take if all are connected: checking all files of a store lies between two words."""

HINT = "type the same command again on all hosts: it goes on where it was"

GONE = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class CheckedGroup:
    """A group whose gathers give what was sent, or raise RingError.

    Args:
        group: over MLX's ring.
        connections: to its neighbours.
    """

    def __init__(self, group: Group, connections: Sequence[int] = ()):
        self.rank, self.size = group.rank, group.size
        self._group = group
        self._number = 0
        self._poll = select.poll()
        for connection in connections:
            self._poll.register(connection, GONE)
        self._asked: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[np.ndarray | RuntimeError] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def sum(self, x: mx.array) -> mx.array:
        """Sum over the hosts."""
        return self.gather(x).sum(axis=0)

    def gather(self, x: mx.array) -> mx.array:
        """Everybody's x, stacked on a new first axis.

        Raises:
            RingError: a host is lost.
        """
        row = np.array(x)
        data = row.reshape(-1).view(np.uint8)
        self._number += 1
        seal = np.array([self._number, crc32(data.data)], np.int64)
        self._asked.put(np.concatenate([seal.view(np.uint8), data]))
        rows = self._answer()
        if not all(map(self._is_sealed, rows)):
            raise _lost()
        return mx.array(np.ascontiguousarray(rows[:, SEAL_BYTES:]).view(row.dtype).reshape(self.size, *row.shape))

    def _answer(self) -> np.ndarray:
        """What MLX's gather returns; unlike its own wait this one ends, and Ctrl-C gets through."""
        limit_s = time.monotonic() + SILENCE_LIMIT_S
        patience_s = LOOK_S
        while True:
            try:
                answer = self._answered.get(timeout=patience_s)
            except queue.Empty:
                if patience_s == GRACE_S:
                    raise _lost() from None
                if time.monotonic() > limit_s:
                    raise RingError(f"the other hosts have been silent for {SILENCE_LIMIT_S:.0f} s", HINT) from None
                if self._poll.poll(0):
                    patience_s = GRACE_S
                continue
            if isinstance(answer, RuntimeError):
                raise _lost() from answer
            return answer

    def _is_sealed(self, sealed: np.ndarray) -> bool:
        number, checksum = np.frombuffer(sealed[:SEAL_BYTES].tobytes(), np.int64)
        return number == self._number and checksum == crc32(sealed[SEAL_BYTES:].data)

    def _work(self) -> None:
        while True:
            row = self._asked.get()
            try:
                self._answered.put(np.array(self._group.gather(mx.array(row))))
            except RuntimeError as error:
                self._answered.put(error)


def join_checked(connect: Callable[[], mx.distributed.Group]) -> CheckedGroup:
    """Join a group.

    Args:
        connect: makes MLX's connections to the neighbours.

    Raises:
        RuntimeError: the others cannot be reached.
    """
    before = _connections()
    group = MlxGroup(connect())
    return CheckedGroup(group, sorted(_connections() - before))


def _connections() -> set[int]:
    """File descriptors of this process that are connected sockets."""
    return {number for number in map(int, os.listdir("/dev/fd")) if _is_connected(number)}


def _is_connected(number: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return False
        with socket.socket(fileno=os.dup(number)) as connection:
            connection.getpeername()
    except OSError:  # a socket that listens
        return False
    return True


def _lost() -> RingError:
    return RingError("another host has ended, or cannot be reached any more", HINT)

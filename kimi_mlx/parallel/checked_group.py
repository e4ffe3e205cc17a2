"""A group for downloads that take hours: it detects lost hosts and never returns invalid data.

When MLX's ring loses a peer (seen in 0.32), a gather may return uninitialized memory, and later ones hang. Therefore
each row carries a number and a checksum, gathers run in a thread that can be abandoned, and MLX's connections are
polled meanwhile.
"""

from __future__ import annotations

import queue
import select
import threading
import time
from collections.abc import Sequence
from zlib import crc32

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.parallel.group import Group

FRAME_HEADER_BYTES = 16
"""Size of the sequence number and the checksum in front of each row."""

POLL_INTERVAL_S = 0.5
"""Interval at which the connections are polled."""

GRACE_S = 2.0
"""Grace period: a peer may close its connection right after its last message."""

SILENCE_LIMIT_S = 1800.0
"""Maximum wait for connected hosts, which may check all files of a store between two gathers."""

HINT = "run the same command again on all hosts to resume"

HANGUP_EVENTS = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class CheckedGroup:
    """A group whose gathers return what was sent, or raise RingError.

    Args:
        group: group over MLX's ring.
        connections: file descriptors of the connections to the neighbours.
    """

    def __init__(self, group: Group, connections: Sequence[int] = ()):
        self.rank, self.size = group.rank, group.size
        self._group = group
        self._sequence_number = 0
        self._poll = select.poll()
        for connection in connections:
            self._poll.register(connection, HANGUP_EVENTS)
        self._requests: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[np.ndarray | RuntimeError] = queue.SimpleQueue()
        threading.Thread(target=self._run_gathers, daemon=True).start()

    def sum(self, x: mx.array) -> mx.array:
        """Sum over the hosts."""
        return self.gather(x).sum(axis=0)

    def gather(self, x: mx.array) -> mx.array:
        """Stack x of all hosts on a new first axis.

        Raises:
            RingError: a host is lost.
        """
        row = np.array(x)
        data = row.reshape(-1).view(np.uint8)
        self._sequence_number += 1
        header = np.array([self._sequence_number, crc32(data.data)], np.int64)
        self._requests.put(np.concatenate([header.view(np.uint8), data]))
        rows = self._wait()
        if not all(map(self._is_valid, rows)):
            raise _lost_host_error()
        return mx.array(
            np.ascontiguousarray(rows[:, FRAME_HEADER_BYTES:]).view(row.dtype).reshape(self.size, *row.shape)
        )

    def _wait(self) -> np.ndarray:
        """Wait for MLX's gather. Unlike MLX's own wait it ends when a host is lost, and on Ctrl-C."""
        deadline = time.monotonic() + SILENCE_LIMIT_S
        timeout_s = POLL_INTERVAL_S
        while True:
            try:
                answer = self._results.get(timeout=timeout_s)
            except queue.Empty:
                if timeout_s == GRACE_S:
                    raise _lost_host_error() from None
                if time.monotonic() > deadline:
                    raise RingError(f"the other hosts have not answered for {SILENCE_LIMIT_S:.0f} s", HINT) from None
                if self._poll.poll(0):
                    timeout_s = GRACE_S
                continue
            if isinstance(answer, RuntimeError):
                raise _lost_host_error() from answer
            return answer

    def _is_valid(self, frame: np.ndarray) -> bool:
        """Return whether a row belongs to this gather and arrived intact."""
        number, checksum = np.frombuffer(frame[:FRAME_HEADER_BYTES].tobytes(), np.int64)
        return number == self._sequence_number and checksum == crc32(frame[FRAME_HEADER_BYTES:].data)

    def _run_gathers(self) -> None:
        while True:
            row = self._requests.get()
            try:
                self._results.put(np.array(self._group.gather(mx.array(row))))
            except RuntimeError as error:
                self._results.put(error)


def _lost_host_error() -> RingError:
    return RingError("another host has stopped or cannot be reached any more", HINT)

"""Messages between the processes of a build, one per process and round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BATCH_BYTES = 1 << 24
"""Maximum number of bytes that a process sends in a round."""

IDLE, BATCH, END, DONE, FAILED = range(5)
"""Kinds of messages: nothing to send yet, data of a source file, end of a source file, no more files, error."""


@dataclass
class RoundMessage:
    """Message of one process in one round.

    Args:
        kind: IDLE, BATCH, END, DONE or FAILED.
        source: number of the source file, for BATCH and END.
        batch: 0-based number of the batch within the source file.
        data: (bytes,) uint8; None for a message without data.
    """

    kind: int
    source: int = 0
    batch: int = 0
    data: np.ndarray | None = None

    def header(self, fetched_bytes: int, stored_bytes: int) -> np.ndarray:
        """Return the header that every process sends: (6,) int64."""
        length = 0 if self.data is None else self.data.size
        return np.array([self.kind, self.source, self.batch, length, fetched_bytes, stored_bytes], np.int64)


class BatchWriter:
    """Join chunks of one source file into messages of BATCH_BYTES.

    Args:
        source: number of the source file.
    """

    def __init__(self, source: int):
        self._source = source
        self._chunks: list[np.ndarray] = []
        self._size = self._number = 0

    def add(self, chunk: np.ndarray) -> Iterator[RoundMessage]:
        """Append a chunk; yield the batches that are full."""
        while chunk.size:
            free = BATCH_BYTES - self._size
            self._chunks.append(chunk[:free])
            self._size += self._chunks[-1].size
            chunk = chunk[free:]
            if self._size == BATCH_BYTES:
                yield self._pop_batch()

    def flush(self) -> Iterator[RoundMessage]:
        """Yield the last, partial batch, if any."""
        if self._size:
            yield self._pop_batch()

    def _pop_batch(self) -> RoundMessage:
        message = RoundMessage(BATCH, self._source, self._number, np.concatenate(self._chunks))
        self._chunks, self._size = [], 0
        self._number += 1
        return message

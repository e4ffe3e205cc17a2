"""Queue of the sequences that wait for the engine, fair to all clients."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from kimi_mlx.engine.sequence import Sequence


class FairQueue:
    """Waiting sequences. Clients take turns; those of one client stay in order of arrival.

    The order depends only on the order of calls, so ranks that make the same calls agree on it.
    """

    def __init__(self) -> None:
        self._by_client: dict[str, deque[Sequence]] = {}
        """Sequences by client, never empty; the client whose turn it is comes first."""

    def __bool__(self) -> bool:
        """Whether a sequence waits."""
        return bool(self._by_client)

    def __len__(self) -> int:
        """Return the number of waiting sequences."""
        return sum(map(len, self._by_client.values()))

    def append(self, sequence: Sequence) -> None:
        """Add a sequence after those of its client; a new client comes last."""
        self._by_client.setdefault(sequence.request.client, deque()).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Put a preempted sequence at the front of the queue."""
        client = sequence.request.client
        sequences = self._by_client.pop(client, deque())
        sequences.appendleft(sequence)
        self._by_client = {client: sequences, **self._by_client}

    @property
    def clients(self) -> Iterable[str]:
        """Clients with waiting sequences; the one whose turn it is comes first."""
        return self._by_client

    def in_turn(self, clients: Iterable[str]) -> list[Sequence]:
        """Return all sequences of some clients in the order in which they should be admitted."""
        return round_robin(self._by_client[client] for client in clients)

    def take(self, sequence: Sequence) -> None:
        """Remove a sequence that is admitted; its client's next turn comes after those of all others."""
        self.remove(sequence)
        client = sequence.request.client
        if client in self._by_client:
            self._by_client[client] = self._by_client.pop(client)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence."""
        client = sequence.request.client
        sequences = self._by_client[client]
        sequences.remove(sequence)
        if not sequences:
            del self._by_client[client]

    def find(self, request_id: int) -> Sequence | None:
        """Return the waiting sequence of a request; None if there is none."""
        sequences = (sequence for queue in self._by_client.values() for sequence in queue)
        return next((sequence for sequence in sequences if sequence.request_id == request_id), None)

    def clear(self) -> None:
        """Remove all sequences."""
        self._by_client.clear()


def round_robin(queues: Iterable[Iterable[Sequence]]) -> list[Sequence]:
    """Return the first sequence of each queue, then the second of each, and so on."""
    turns: list[Sequence] = []
    remaining: list[Iterator[Sequence]] = [iter(queue) for queue in queues]
    while remaining:
        waiting: list[Iterator[Sequence]] = []
        for queue in remaining:
            if (sequence := next(queue, None)) is not None:
                turns.append(sequence)
                waiting.append(queue)
        remaining = waiting
    return turns

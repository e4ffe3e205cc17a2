"""Order in which the prompts of a batch are prefilled."""

from __future__ import annotations

from collections.abc import Iterable

from kimi_mlx.engine.fair_queue import round_robin
from kimi_mlx.engine.sequence import Sequence

SHORT_PROMPT = 64
"""Prompts with at most this many tokens left are prefilled before long ones in every other step."""


class PrefillOrder:
    """Orders prompts: clients take turns, and a client's prompts are prefilled one after the other as they arrived.

    So a client's first prompt is answered first; only a short prompt may overtake a long one.
    """

    def __init__(self) -> None:
        self._last_served: dict[str, None] = {}
        """Clients whose prompts were prefilled, least recently served first."""
        self._has_put_short_first = False

    def next_prompts(self, prompts: Iterable[Sequence]) -> list[Sequence]:
        """Return the prompts of the next step, in order: all of them, or only the short ones.

        Args:
            prompts: sequences with prompt tokens that can be computed now.
        """
        by_arrival = sorted(prompts, key=lambda sequence: sequence.request_id)
        queues: dict[str, list[Sequence]] = {}
        for sequence in by_arrival:
            queues.setdefault(sequence.request.client, []).append(sequence)
        self._last_served = {client: None for client in self._last_served if client in queues}
        new_clients = [client for client in queues if client not in self._last_served]
        ordered = round_robin(queues[client] for client in (*new_clients, *self._last_served))
        short = [sequence for sequence in ordered if sequence.remaining_prompt <= SHORT_PROMPT]
        self._has_put_short_first = 0 < len(short) < len(ordered) and not self._has_put_short_first
        return short if self._has_put_short_first else ordered

    def record(self, sequence: Sequence) -> None:
        """Record that a part of a prompt is prefilled: its client moves to the end of the order."""
        client = sequence.request.client
        self._last_served.pop(client, None)
        self._last_served[client] = None

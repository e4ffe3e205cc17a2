"""Queue of the engine's events for the event loop."""

from __future__ import annotations

import asyncio
from collections import deque

from kimi_mlx.engine.events import Event

EngineEvent = tuple[int, "Event | BaseException"]
"""Index of an answer, and an event or error of the engine."""


class EventQueue:
    """Passes events from the engine's thread to the event loop; one reader, any number of writers."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[EngineEvent] = deque()
        self._is_woken = False
        self._arrived = asyncio.Event()

    def put(self, index: int, event: Event | BaseException) -> None:
        """Append an event and wake the loop (wake-ups are coalesced)."""
        self._events.append((index, event))
        if not self._is_woken:
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._arrived.set)
            except RuntimeError:  # the loop has ended, so there is no reader
                self._events.clear()

    async def take(self, timeout_s: float) -> list[EngineEvent]:
        """Return all events that have arrived; an empty list if none arrives in time."""
        if not self._events:
            try:
                await asyncio.wait_for(self._arrived.wait(), max(timeout_s, 0.001))
            except asyncio.TimeoutError:
                return []
        self._arrived.clear()
        self._is_woken = False  # before events are taken, so that later ones wake the loop again
        return [self._events.popleft() for _ in range(len(self._events))]

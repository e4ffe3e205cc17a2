"""Events of the engine's thread, brought to the loop that serves the requests."""

from __future__ import annotations

import asyncio
from collections import deque

from kimi_mlx.engine.request import Event

EngineEvent = tuple[int, "Event | BaseException"]
"""Which answer, and what the engine says of it."""


class EventQueue:
    """For one reader in the loop that makes it; writers may be any threads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: deque[EngineEvent] = deque()
        self._is_woken = False
        self._arrived = asyncio.Event()

    def put(self, index: int, event: Event | BaseException) -> None:
        """Add news; wakes the loop once for all that come before it looks."""
        self._news.append((index, event))
        if not self._is_woken:
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._arrived.set)
            except RuntimeError:  # the loop has ended, so nobody reads any more
                self._news.clear()

    async def take(self, wait_s: float) -> list[EngineEvent]:
        """All that has come; nothing after so many seconds without news."""
        if not self._news:
            try:
                await asyncio.wait_for(self._arrived.wait(), max(wait_s, 0.001))
            except asyncio.TimeoutError:
                return []
        self._arrived.clear()
        self._is_woken = False  # before the news are taken: what comes later wakes again
        return [self._news.popleft() for _ in range(len(self._news))]

"""Queues of the engine's events for the event loop."""

from __future__ import annotations

import asyncio
from collections import deque

from kimi_mlx.engine.events import Event

EngineEvent = tuple[int, "Event | BaseException"]
"""Index of an answer, and an event or error of the engine."""


class EventQueue:
    """Passes events from the engine's thread to the event loop; one reader, any number of writers.

    Args:
        waker: wakes the event loop for all queues.
    """

    def __init__(self, waker: LoopWaker):
        self._waker = waker
        self._events: deque[EngineEvent] = deque()
        self._is_woken = False
        self._arrived: asyncio.Future[None] | None = None

    def put(self, index: int, event: Event | BaseException) -> None:
        """Append an event and wake the reader (wake-ups are coalesced)."""
        self._events.append((index, event))
        if not self._is_woken:
            self._is_woken = True
            self._waker.wake(self)

    async def take(self, timeout_s: float) -> list[EngineEvent]:
        """Return all events that have arrived; an empty list if none arrives in time."""
        if not self._events:
            loop = asyncio.get_running_loop()
            self._arrived = loop.create_future()
            timer = loop.call_later(max(timeout_s, 0.001), self.on_woken)
            try:
                await self._arrived
            finally:
                timer.cancel()
                self._arrived = None
        self._is_woken = False  # before events are taken, so that later ones wake the loop again
        return [self._events.popleft() for _ in range(len(self._events))]

    def on_woken(self) -> None:
        """Resume the reader if it waits; called in the event loop."""
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


class LoopWaker:
    """Wakes the event loop once for the events of all queues, because each wake-up is a system call.

    A step of the engine has an event for each of its sequences. Create it in the event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken: deque[EventQueue] = deque()
        self._is_scheduled = False

    def wake(self, queue: EventQueue) -> None:
        """Resume the reader of a queue; may be called in any thread."""
        self._woken.append(queue)
        if not self._is_scheduled:
            self._is_scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._run)
            except RuntimeError:  # the loop has ended, so there is no reader
                self._woken.clear()

    def _run(self) -> None:
        self._is_scheduled = False  # before queues are taken, so that later ones schedule the next run
        for _ in range(len(self._woken)):
            self._woken.popleft().on_woken()

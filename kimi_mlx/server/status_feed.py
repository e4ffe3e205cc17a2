"""Status of the server as a stream of server-sent events: one producer for all listeners, none without listeners."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, cast

from kimi_mlx.server.errors import ApiError

INTERVAL_S = 1.0
"""Time between two looks at the status."""

REFRESH_S = 5.0
"""Time after which a status is sent even if only its clocks have changed."""

MAX_WAIT_S = 3 * REFRESH_S
"""Time without a status after which a stream fails, because the producer has."""

MAX_LISTENERS = 64

CLOCKS = frozenset({"uptime_s", "last_message_s"})
"""Fields that change all the time, at any depth."""


class StatusFeed:
    """Sends the status to all listeners whenever it has changed.

    A slow listener misses statuses; it receives the newest one as soon as it reads.

    Args:
        read: function that returns the current status.
        is_closing: function that returns whether the server is shutting down, which ends all streams.
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]], is_closing: Callable[[], bool]):
        self._read, self._is_closing = read, is_closing
        self._num_listeners = 0
        self._producer: asyncio.Task[None] | None = None
        self._published = asyncio.Event()
        self._newest = b""

    def check_capacity(self) -> None:
        """Refuse another listener if there are too many.

        Raises:
            ApiError: 429.
        """
        if self._num_listeners >= MAX_LISTENERS:
            message = f"{MAX_LISTENERS} streams of the status are open; close some"
            raise ApiError(429, message, "too_many_streams", retry_after_s=5)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the current status, then each change, as server-sent events, until the server shuts down."""
        self._num_listeners += 1
        try:
            if self._producer is None:
                self._newest = _event(self._read())
                self._producer = asyncio.create_task(self._produce())
            while not self._is_closing():
                published = self._published
                yield self._newest
                await asyncio.wait_for(published.wait(), MAX_WAIT_S)
        finally:
            self._num_listeners -= 1
            if self._num_listeners == 0 and self._producer is not None:
                self._producer.cancel()
                self._producer = None

    async def _produce(self) -> None:
        """Look at the status until this task is cancelled."""
        last, age = _without_clocks(self._read()), 0.0
        while True:
            await asyncio.sleep(INTERVAL_S)
            status = self._read()
            age += INTERVAL_S
            without_clocks = _without_clocks(status)
            if without_clocks == last and age < REFRESH_S and not self._is_closing():
                continue
            last, age = without_clocks, 0.0
            self._newest = _event(status)
            self._published.set()
            self._published = asyncio.Event()


def _without_clocks(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {name: _without_clocks(item) for name, item in items if name not in CLOCKS}
    if isinstance(value, list | tuple):
        return [_without_clocks(item) for item in cast("Sequence[Any]", value)]
    return value


def _event(status: Mapping[str, Any]) -> bytes:
    data = json.dumps(status, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"event: status\ndata: {data}\n\n".encode(errors="replace")

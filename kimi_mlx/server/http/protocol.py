"""HTTP/1.1 with time limits: uvicorn has none for clients that stop sending or receiving."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_LIMIT_S = 20.0
"""Time limit for the headers of a request, from its first byte or the start of the connection."""

WRITE_LIMIT_S = 30.0
"""Time after which a connection is closed if no data can be sent."""


class TimeoutProtocol(H11Protocol):
    """Closes connections whose client is too slow."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Start to wait for headers."""
        super().connection_made(transport)
        self._start_headers_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        self._headers_timer = _stop(self._headers_timer)
        self._write_timer = _stop(self._write_timer)

    def data_received(self, data: bytes) -> None:
        """Process data; if it does not complete the headers, they must be complete within the limit."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self._headers_timer = _stop(self._headers_timer)
        else:
            self._start_headers_timer()

    def pause_writing(self) -> None:
        """Start the write timer: the send buffer is full because the client does not read."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_LIMIT_S, self._abort)

    def resume_writing(self) -> None:
        """Stop the write timer: the client reads again."""
        super().resume_writing()
        self._write_timer = _stop(self._write_timer)

    def _start_headers_timer(self) -> None:
        if self._headers_timer is None:
            self._headers_timer = self.loop.call_later(HEADERS_LIMIT_S, self._abort)

    def _abort(self) -> None:
        self.transport.abort()  # close() would wait until the client has read everything


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()

"""HTTP with time limits: uvicorn's own has none for who sends or takes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_LIMIT_S = 20.0
"""For the head of a request, from its first byte or the connection's begin."""

WRITE_LIMIT_S = 30.0
"""A client that takes nothing for so long has gone."""


class TimeoutProtocol(H11Protocol):
    """Ends connections whose client is too slow."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wait for a head."""
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch nothing any more."""
        super().connection_lost(exc)
        self._head_timer = _stop(self._head_timer)
        self._write_timer = _stop(self._write_timer)

    def data_received(self, data: bytes) -> None:
        """Take data; a head that is not whole after it must soon be."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self._head_timer = _stop(self._head_timer)
        else:
            self._watch_head()

    def pause_writing(self) -> None:
        """The client does not take what it is sent."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_LIMIT_S, self._abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._write_timer = _stop(self._write_timer)

    def _watch_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_LIMIT_S, self._abort)

    def _abort(self) -> None:
        self.transport.abort()  # close() would wait for what nobody takes


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()

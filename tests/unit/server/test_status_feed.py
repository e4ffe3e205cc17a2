"""The stream of the status: one producer for all, newest status first, nothing without listeners."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from kimi_mlx.server import status_feed
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.status_feed import MAX_LISTENERS, StatusFeed


class _Status:
    """A status that counts how often it is read."""

    def __init__(self) -> None:
        self.reads, self.value, self.is_closing = 0, 0, False

    def read(self) -> dict[str, Any]:
        self.reads += 1
        return {"value": self.value, "uptime_s": self.reads}


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> _Status:
    monkeypatch.setattr(status_feed, "INTERVAL_S", 0.01)
    return _Status()


async def value_of(events: AsyncGenerator[bytes, None]) -> int:
    event = await asyncio.wait_for(anext(events), 5)
    assert event.startswith(b"event: status\ndata: ")
    assert event.endswith(b"\n\n")
    return json.loads(event.partition(b"data: ")[2])["value"]


def test_all_listeners_see_changes_from_one_producer(status: _Status) -> None:
    async def run() -> None:
        feed = StatusFeed(status.read, lambda: status.is_closing)
        streams = [feed.events() for _ in range(3)]
        assert [await value_of(stream) for stream in streams] == [0, 0, 0]
        assert status.reads == 2  # by the first stream and by its producer
        waiting = [asyncio.ensure_future(value_of(stream)) for stream in streams]
        status.value = 7
        assert await asyncio.gather(*waiting) == [7, 7, 7]
        for stream in streams:
            await stream.aclose()
        reads = status.reads
        await asyncio.sleep(0.05)
        assert status.reads == reads

    asyncio.run(run())


def test_clocks_alone_are_no_change(status: _Status) -> None:
    async def run() -> None:
        stream = StatusFeed(status.read, lambda: status.is_closing).events()
        await value_of(stream)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.1)
        assert status.reads > 3

    asyncio.run(run())


def test_streams_end_when_the_server_closes(status: _Status) -> None:
    async def run() -> None:
        stream = StatusFeed(status.read, lambda: status.is_closing).events()
        await value_of(stream)
        status.is_closing = True
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(stream), 5)

    asyncio.run(run())


def test_too_many_listeners_are_refused(status: _Status) -> None:
    async def run() -> None:
        feed = StatusFeed(status.read, lambda: False)
        streams = [feed.events() for _ in range(MAX_LISTENERS)]
        for stream in streams:
            feed.check_capacity()
            await anext(stream)
        with pytest.raises(ApiError, match="64 streams"):
            feed.check_capacity()
        for stream in streams:
            await stream.aclose()
        feed.check_capacity()

    asyncio.run(run())

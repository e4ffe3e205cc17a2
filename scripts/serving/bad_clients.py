"""Clients that a server must bear: streams that are broken off, and readers that are slow."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import httpx2

from scripts.serving.client import CHAT_PATH, events, make_body, make_client
from scripts.serving.prompts import random_text
from scripts.serving.servers import ServerUnderTest

PIECES_BEFORE_ABORT = 3
ABORTS_AT_ONCE = 4
PAUSE_S = 0.25
"""Of a slow reader, before each read."""

READ_BYTES = 1024
SMALL_BUFFER_BYTES = 4096
"""So small that what a slow reader does not take waits at the server."""


@dataclass(frozen=True)
class BadClientOptions:
    """What others do to a server.

    Args:
        aborts: streams that are closed by their clients: each second one after its first event, the others after a few.
        slow_readers: streams that are read slowly.
        prompt_tokens: of each.
        answer_tokens: asked for in each.
        slow_s: so long a slow reader stays, at most.
    """

    aborts: int = 0
    slow_readers: int = 0
    prompt_tokens: int = 64
    answer_tokens: int = 1000
    slow_s: float = 20.0


@dataclass(frozen=True)
class BadClientResult:
    """What came of it.

    Args:
        aborted: streams that were closed by their clients.
        slow_reads: streams that a slow reader read, to the end or for its time.
        errors: of either kind, that were the server's doing.
    """

    aborted: int
    slow_reads: int
    errors: tuple[str, ...]


class BadClients:
    """Those who disturb a server, on connections of their own."""

    def __init__(self, served: ServerUnderTest, bad_clients: BadClientOptions):
        self._wanted = bad_client_options
        self._quick = make_client(served.url, served.api_key)
        self._slow = make_client(served.url, served.api_key, receive_bytes=SMALL_BUFFER_BYTES)

    async def run(self) -> BadClientResult:
        """Do all of it at the same time."""
        turns = asyncio.Semaphore(ABORTS_AT_ONCE)
        async with self._quick, self._slow:
            aborts = [self._abort(number, turns) for number in range(self._wanted.aborts)]
            readers = [self._slow_read(self._wanted.aborts + at) for at in range(self._wanted.slow_readers)]
            ends = await asyncio.gather(*aborts, *readers)
        aborted = sum(each is None for each in ends[: len(aborts)])
        errors = tuple(each for each in ends if each is not None)
        return BadClientResult(aborted, len(ends) - len(errors) - aborted, errors)

    async def _abort(self, number: int, turns: asyncio.Semaphore) -> str | None:
        """Begin a stream and close it; what went wrong before that."""
        async with turns:
            try:
                async with self._quick.stream("POST", CHAT_PATH, json=self._body(number)) as response:
                    if response.status_code != 200:
                        return f"HTTP {response.status_code}"
                    seen = 0
                    async for _ in events(response):
                        seen += 1
                        if number % 2 or seen == PIECES_BEFORE_ABORT:
                            return None
                    return "a stream that ended before it was closed"
            except httpx2.HTTPError as error:
                return type(error).__name__

    async def _slow_read(self, number: int) -> str | None:
        """Read a stream a little at a time; what went wrong."""
        ends_at = time.monotonic() + self._wanted.slow_s
        try:
            async with self._slow.stream("POST", CHAT_PATH, json=self._body(number)) as response:
                if response.status_code != 200:
                    return f"HTTP {response.status_code}"
                async for _ in response.aiter_raw(READ_BYTES):
                    await asyncio.sleep(PAUSE_S)
                    if time.monotonic() > ends_at:
                        break
                return None
        except httpx2.HTTPError as error:
            return type(error).__name__

    def _body(self, number: int) -> dict[str, object]:
        said = random_text(self._wanted.prompt_tokens, 0, 0, number)
        return make_body([{"role": "user", "content": said}], self._wanted.answer_tokens, stream=True)

"""Clients that a server has to tolerate: some abort their streams, others read slowly."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import httpx2

from scripts.serving.client import CHAT_PATH, events, make_body, make_client
from scripts.serving.prompts import random_text
from scripts.serving.servers import ServerUnderTest

EVENTS_BEFORE_ABORT = 3
MAX_CONCURRENT_ABORTS = 4
SUSPEND_GAP_S = 0.25
"""Pause of a slow reader before each read."""

READ_BYTES = 1024
SMALL_BUFFER_BYTES = 4096
"""Receive buffer of a slow reader: so small that unread data waits at the server."""


@dataclass(frozen=True)
class BadClientOptions:
    """Number and kind of badly behaved clients.

    Args:
        aborts: number of streams that the client closes: every second one after its first event, the others after
            EVENTS_BEFORE_ABORT events.
        slow_readers: number of streams that are read slowly.
        prompt_tokens: number of prompt tokens of each.
        answer_tokens: `max_tokens` of each.
        slow_s: time after which a slow reader stops.
    """

    aborts: int = 0
    slow_readers: int = 0
    prompt_tokens: int = 64
    answer_tokens: int = 1000
    slow_s: float = 20.0


@dataclass(frozen=True)
class BadClientResult:
    """Outcome of the badly behaved clients.

    Args:
        aborted: number of streams that the client closed.
        slow_reads: number of streams that were read slowly, to the end or for `slow_s`.
        errors: errors of both kinds that the server caused.
    """

    aborted: int
    slow_reads: int
    errors: tuple[str, ...]


class BadClients:
    """Badly behaved clients of one server, on connections of their own."""

    def __init__(self, server: ServerUnderTest, options: BadClientOptions):
        self._options = options
        self._fast_client = make_client(server.url, server.api_key)
        self._slow_client = make_client(server.url, server.api_key, receive_bytes=SMALL_BUFFER_BYTES)

    async def run(self) -> BadClientResult:
        """Run all of them concurrently."""
        slots = asyncio.Semaphore(MAX_CONCURRENT_ABORTS)
        async with self._fast_client, self._slow_client:
            aborts = [self._abort(number, slots) for number in range(self._options.aborts)]
            readers = [self._slow_read(self._options.aborts + number) for number in range(self._options.slow_readers)]
            errors = await asyncio.gather(*aborts, *readers)
        aborted = sum(error is None for error in errors[: len(aborts)])
        failures = tuple(error for error in errors if error is not None)
        return BadClientResult(aborted, len(errors) - len(failures) - aborted, failures)

    async def _abort(self, number: int, slots: asyncio.Semaphore) -> str | None:
        """Start a stream and close it. Return the error, if any came first."""
        async with slots:
            try:
                async with self._fast_client.stream("POST", CHAT_PATH, json=self._body(number)) as response:
                    if response.status_code != 200:
                        return f"HTTP {response.status_code}"
                    num_events = 0
                    async for _ in events(response):
                        num_events += 1
                        if number % 2 or num_events == EVENTS_BEFORE_ABORT:
                            return None
                    return "a stream that ended before it was closed"
            except httpx2.HTTPError as error:
                return type(error).__name__

    async def _slow_read(self, number: int) -> str | None:
        """Read a stream slowly. Return the error, if there is one."""
        ends_at = time.monotonic() + self._options.slow_s
        try:
            async with self._slow_client.stream("POST", CHAT_PATH, json=self._body(number)) as response:
                if response.status_code != 200:
                    return f"HTTP {response.status_code}"
                async for _ in response.aiter_raw(READ_BYTES):
                    await asyncio.sleep(SUSPEND_GAP_S)
                    if time.monotonic() > ends_at:
                        break
                return None
        except httpx2.HTTPError as error:
            return type(error).__name__

    def _body(self, number: int) -> dict[str, object]:
        message = random_text(self._options.prompt_tokens, 0, 0, number)
        return make_body([{"role": "user", "content": message}], self._options.answer_tokens, stream=True)

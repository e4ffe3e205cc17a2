"""Rendering of Markdown outside of the event loop, so that no client stalls others."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cached_property, partial

import anyio
import anyio.to_process
import anyio.to_thread

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.page.render import Block, render_blocks

SHORT_TEXT_CHARS = 4000
"""Maximum length of a text that is rendered in a thread of this process: milliseconds, 0.2 s for a hostile text.

Python code in a thread delays the streams of the server, so longer texts go to worker processes."""

NUM_THREADS = 1
NUM_PROCESSES = 2

LIMIT_S = 5.0
"""Time limit for a text in a worker process, which is killed after it."""

MAX_WAITING = 64
"""Maximum number of texts of one client address in the queue; further ones are refused."""


class RenderQueue:
    """Renders texts: one at a time for each client, in order."""

    def __init__(self) -> None:
        self._num_waiting: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Lock] = {}

    async def render(self, client: str, text: str, *, is_final: bool) -> list[Block]:
        """Return the blocks of a text.

        Args:
            client: address of the client.
            text: Markdown, from the beginning of a block.
            is_final: whether no text will be appended.

        Raises:
            ApiError: the text takes too long, or the client has sent too many.
        """
        work = partial(render_blocks, text, is_final=is_final)
        async with self._turn(client):
            if len(text) <= SHORT_TEXT_CHARS:
                return await anyio.to_thread.run_sync(work, limiter=self._threads)
            return await self._in_process(work)

    async def _in_process(self, work: partial[list[Block]]) -> list[Block]:
        async with self._processes:
            try:
                with anyio.fail_after(LIMIT_S):
                    try:
                        return await anyio.to_process.run_sync(work, cancellable=True)
                    except anyio.BrokenWorkerProcess:  # it may have ended while it was idle
                        return await anyio.to_process.run_sync(work, cancellable=True)
            except TimeoutError as error:
                message = f"rendering the text takes more than {LIMIT_S:.0f} s"
                raise ApiError(400, message, "invalid_value", "text") from error
            except anyio.BrokenWorkerProcess as error:
                raise ApiError(503, "the text could not be rendered; try again", "unavailable") from error

    @asynccontextmanager
    async def _turn(self, client: str) -> AsyncGenerator[None, None]:
        """Wait until the earlier texts of a client are rendered."""
        if self._num_waiting[client] >= MAX_WAITING:
            message = f"{MAX_WAITING} texts are being rendered for this client; wait for them"
            raise ApiError(429, message, "too_many_texts", retry_after_s=1)
        self._num_waiting[client] += 1
        try:
            async with self._turns.setdefault(client, asyncio.Lock()):
                yield
        finally:
            self._num_waiting[client] -= 1
            if not self._num_waiting[client]:
                del self._num_waiting[client], self._turns[client]

    @cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(NUM_THREADS)

    @cached_property
    def _processes(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(NUM_PROCESSES)

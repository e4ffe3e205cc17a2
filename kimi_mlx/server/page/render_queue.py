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
SHORT_CODE_CHARS = 1000
MAX_CELLS = 2000
"""Largest texts, without and with code, and largest table, that are rendered in a thread of this process.

They take milliseconds, hostile ones 0.1 s; Python code in a thread delays the streams of the server. So all others go
to worker processes: 4,000 characters of code may take a lexer 0.7 s, and those of a table may become 65,536 cells."""

CODE_FENCES = ("```", "~~~")

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
            if _is_light(text):
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


def _is_light(text: str) -> bool:
    """Return whether rendering a text takes no time that others notice. A table's rows are as long as its first."""
    if text.count("|") * (text.count("\n") + text.count("\r")) > MAX_CELLS:
        return False
    has_code = any(fence in text for fence in CODE_FENCES)
    return len(text) <= (SHORT_CODE_CHARS if has_code else SHORT_TEXT_CHARS)

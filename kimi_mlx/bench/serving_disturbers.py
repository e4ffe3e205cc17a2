"""Clients that a server must bear: streams that are broken off, and readers that are slow."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

import httpx2

from kimi_mlx.bench.serving_client import body_of, events, make_client
from kimi_mlx.bench.serving_prompts import random_text
from kimi_mlx.bench.serving_servers import Served

PIECES_BEFORE_ABORT = 3
ABORTS_AT_ONCE = 4
PAUSE_S = 0.25
"""Of a slow reader, before each read."""

SMALL_BUFFER = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)]
"""So small that what a slow reader does not take waits at the server."""


@dataclass(frozen=True)
class Disturbance:
    """What others do to a server.

    Args:
        aborts: streams that are closed after a few pieces; every second one while its prompt is read.
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
class Disturbed:
    """What came of it.

    Args:
        aborted: streams that were closed by their clients.
        read_slowly: streams that a slow reader read, to the end or for its time.
        errors: of either kind, that were the server's doing.
    """

    aborted: int
    read_slowly: int
    errors: tuple[str, ...]


async def disturb(served: Served, disturbance: Disturbance) -> Disturbed:
    """Do all of it at the same time."""
    turns = asyncio.Semaphore(ABORTS_AT_ONCE)
    aborts = [_abort(served, disturbance, number, turns) for number in range(disturbance.aborts)]
    readers = [_read_slowly(served, disturbance, number) for number in range(disturbance.slow_readers)]
    ends = await asyncio.gather(*aborts, *readers)
    errors = tuple(each for each in ends if each is not None)
    aborted = sum(each is None for each in ends[: len(aborts)])
    return Disturbed(aborted, sum(each is None for each in ends[len(aborts) :]), errors)


async def _abort(served: Served, disturbance: Disturbance, number: int, turns: asyncio.Semaphore) -> str | None:
    """Begin a stream and close it; what went wrong before that."""
    async with turns, make_client(served.url, served.api_key) as client:
        try:
            async with client.stream("POST", "/v1/chat/completions", json=_body(disturbance, number)) as response:
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


async def _read_slowly(served: Served, disturbance: Disturbance, number: int) -> str | None:
    """Read a stream a little at a time, through a small window."""
    transport = httpx2.AsyncHTTPTransport(socket_options=SMALL_BUFFER)
    ends_at = asyncio.get_running_loop().time() + disturbance.slow_s
    async with make_client(served.url, served.api_key, transport) as client:
        try:
            body = _body(disturbance, disturbance.aborts + number)
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    return f"HTTP {response.status_code}"
                async for _ in response.aiter_raw(1024):
                    await asyncio.sleep(PAUSE_S)
                    if asyncio.get_running_loop().time() > ends_at:
                        break
                return None
        except httpx2.HTTPError as error:
            return type(error).__name__


def _body(disturbance: Disturbance, number: int) -> dict[str, object]:
    said = random_text(disturbance.prompt_tokens, 0, 0, number)
    return body_of([{"role": "user", "content": said}], disturbance.answer_tokens, stream=True)

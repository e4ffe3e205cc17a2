"""The serving benchmark: clients that keep a server busy, and what each of their requests took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx2

from scripts.serving.client import Chat, Exchange, ask, body_of, make_client
from scripts.serving.disturbers import Disturbance, Disturbed, Disturbers
from scripts.serving.prompts import Load, random_text
from scripts.serving.servers import Served

Ended = Callable[[Exchange], None]
"""Called with each exchange that has ended."""

Progress = Callable[[str, Exchange], None]
"""The same, behind the server's name."""

SAMPLES = 10
"""So many times in a run the server's memory is looked at."""


@dataclass(frozen=True)
class ServingRun:
    """A load, put on a server once.

    Args:
        side: the server's name.
        repetition: from 0; -1 is a warm-up.
        exchanges: as they ended.
        wall_s: from the first request until the last answer's end.
        resident_bytes: the server's memory before, after each tenth of the requests, and at the end; empty where
            its process is not known.
        disturbed: what others did to the server meanwhile.
    """

    side: str
    repetition: int
    exchanges: tuple[Exchange, ...]
    wall_s: float
    resident_bytes: tuple[int, ...]
    disturbed: Disturbed | None = None


def measure_serving(
    sides: Sequence[Served],
    load: Load,
    warmup: int = 1,
    repeat: int = 3,
    disturbance: Disturbance | None = None,
    progress: Progress = lambda side, exchange: None,
) -> list[ServingRun]:
    """Put a load on each server in turns; the order turns around each time, so that none profits.

    Args:
        sides: the servers; the one that does not have its turn is idle.
        load: what is asked.
        warmup: repetitions that do not count.
        repeat: repetitions that count.
        disturbance: what others do in those that count.
        progress: told of each exchange.
    """
    runs: list[ServingRun] = []
    for repetition in range(-warmup, repeat):
        others = disturbance if repetition >= 0 else None
        for side in sides if repetition % 2 == 0 else sides[::-1]:
            runs.append(run_load(side, load, repetition, others, progress))
    return runs


def run_load(
    served: Served,
    load: Load,
    repetition: int = 0,
    disturbance: Disturbance | None = None,
    progress: Progress = lambda side, exchange: None,
) -> ServingRun:
    """Put a load on a server, with others that disturb it if they are wanted.

    Args:
        served: the server.
        load: what is asked.
        repetition: other numbers have other words, but for the system prompt.
        disturbance: what others do meanwhile.
        progress: told of each exchange.
    """
    return asyncio.run(_run(served, load, repetition, disturbance, progress))


async def _run(
    served: Served, load: Load, repetition: int, disturbance: Disturbance | None, progress: Progress
) -> ServingRun:
    exchanges: list[Exchange] = []
    resident = served.resident_bytes()
    every = max(load.requests // SAMPLES, 1)

    def ended(exchange: Exchange) -> None:
        exchanges.append(exchange)
        if len(exchanges) % every == 0:
            resident.extend(served.resident_bytes())
        progress(served.side, exchange)

    numbers = iter(range(load.conversations))
    disturbers = Disturbers(served, disturbance) if disturbance else None
    async with make_client(served.url, served.api_key) as client:
        others = asyncio.create_task(disturbers.run()) if disturbers else None
        started = time.perf_counter()
        await asyncio.gather(*(_client(client, load, repetition, numbers, ended) for _ in range(load.clients)))
        wall_s = time.perf_counter() - started
        disturbed = await others if others else None
    resident.extend(served.resident_bytes())
    return ServingRun(served.side, repetition, tuple(exchanges), wall_s, tuple(resident), disturbed)


async def _client(
    client: httpx2.AsyncClient, load: Load, repetition: int, numbers: Iterator[int], ended: Ended
) -> None:
    """Take conversations until none is left."""
    for number in numbers:
        chat: Chat = []
        if load.shared_tokens:
            chat.append({"role": "system", "content": random_text(load.shared_tokens, load.seed)})
        for turn in range(load.turns):
            said, tokens = load.said(repetition, number, turn)
            chat.append({"role": "user", "content": said})
            exchange = await ask(client, body_of(chat, tokens, stream=load.stream), Exchange(number, turn, tokens))
            ended(exchange)
            if exchange.error is not None:
                break
            chat.append({"role": "assistant", "content": exchange.text})

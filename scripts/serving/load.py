"""The serving benchmark: clients that keep a server busy, and what each of their requests took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx2

from scripts.serving.bad_clients import BadClientOptions, BadClientResult, BadClients
from scripts.serving.client import Messages, RequestRecord, make_body, make_client, send_request
from scripts.serving.prompts import Workload, random_text
from scripts.serving.servers import ServerUnderTest

Ended = Callable[[RequestRecord], None]
"""Called with each record that has ended."""

Progress = Callable[[str, RequestRecord], None]
"""The same, behind the server's name."""

SAMPLES = 10
"""So many times in a run the server's memory is looked at."""


@dataclass(frozen=True)
class ServingRun:
    """A load, put on a server once.

    Args:
        side: the server's name.
        repetition: from 0; -1 is a warm-up.
        records: as they ended.
        wall_s: from the first request until the last answer's end.
        resident_bytes: the server's memory before, after each tenth of the requests, and at the end; empty where
            its process is not known.
        bad_client_result: what others did to the server meanwhile.
    """

    side: str
    repetition: int
    records: tuple[RequestRecord, ...]
    wall_s: float
    resident_bytes: tuple[int, ...]
    bad_client_result: BadClientResult | None = None


def measure_serving(
    sides: Sequence[ServerUnderTest],
    load: Workload,
    warmup: int = 1,
    repeat: int = 3,
    misbehaviour: BadClientOptions | None = None,
    progress: Progress = lambda side, record: None,
) -> list[ServingRun]:
    """Put a load on each server in turns; the order turns around each time, so that none profits.

    Args:
        sides: the servers; the one that does not have its turn is idle.
        load: what is asked.
        warmup: repetitions that do not count.
        repeat: repetitions that count.
        misbehaviour: what others do in those that count.
        progress: told of each record.
    """
    runs: list[ServingRun] = []
    for repetition in range(-warmup, repeat):
        others = misbehaviour if repetition >= 0 else None
        for side in sides if repetition % 2 == 0 else sides[::-1]:
            runs.append(run_load(side, load, repetition, others, progress))
    return runs


def run_load(
    served: ServerUnderTest,
    load: Workload,
    repetition: int = 0,
    misbehaviour: BadClientOptions | None = None,
    progress: Progress = lambda side, record: None,
) -> ServingRun:
    """Put a load on a server, with others that disturb it if they are wanted.

    Args:
        served: the server.
        load: what is asked.
        repetition: other numbers have other words, but for the system prompt.
        misbehaviour: what others do meanwhile.
        progress: told of each record.
    """
    return asyncio.run(_run(served, load, repetition, misbehaviour, progress))


async def _run(
    served: ServerUnderTest,
    load: Workload,
    repetition: int,
    misbehaviour: BadClientOptions | None,
    progress: Progress,
) -> ServingRun:
    records: list[RequestRecord] = []
    resident = served.resident_bytes()
    every = max(load.requests // SAMPLES, 1)

    def ended(record: RequestRecord) -> None:
        records.append(record)
        if len(records) % every == 0:
            resident.extend(served.resident_bytes())
        progress(served.side, record)

    numbers = iter(range(load.conversations))
    bad_clients = BadClients(served, misbehaviour) if misbehaviour else None
    async with make_client(served.url, served.api_key) as client:
        others = asyncio.create_task(bad_clients.run()) if bad_clients else None
        started = time.perf_counter()
        await asyncio.gather(*(_client(client, load, repetition, numbers, ended) for _ in range(load.clients)))
        wall_s = time.perf_counter() - started
        bad_client_result = await others if others else None
    resident.extend(served.resident_bytes())
    return ServingRun(served.side, repetition, tuple(records), wall_s, tuple(resident), bad_client_result)


async def _client(
    client: httpx2.AsyncClient, load: Workload, repetition: int, numbers: Iterator[int], ended: Ended
) -> None:
    """Take conversations until none is left."""
    for number in numbers:
        chat: Messages = []
        if load.shared_tokens:
            chat.append({"role": "system", "content": random_text(load.shared_tokens, load.seed)})
        for turn in range(load.turns):
            said, tokens = load.user_message(repetition, number, turn)
            chat.append({"role": "user", "content": said})
            record = await send_request(
                client, make_body(chat, tokens, stream=load.stream), RequestRecord(number, turn, tokens)
            )
            ended(record)
            if record.error is not None:
                break
            chat.append({"role": "assistant", "content": record.text})

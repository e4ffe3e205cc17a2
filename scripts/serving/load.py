"""The serving benchmark: clients that keep a server busy, and the times of their requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx2

from scripts.serving.bad_clients import BadClientOptions, BadClientResult, BadClients
from scripts.serving.client import Messages, RequestRecord, make_body, make_client, send_request
from scripts.serving.prompts import Workload
from scripts.serving.servers import ServerUnderTest

OnEnd = Callable[[RequestRecord], None]
"""Callback for each finished request."""

Progress = Callable[[str, RequestRecord], None]
"""The same, with the server's name first."""

SAMPLES = 10
"""Number of times per run that the server's memory is measured."""


@dataclass(frozen=True)
class ServingRun:
    """One run of a workload on a server.

    Args:
        side: name of the server.
        repetition: number of the repetition, from 0; -1 is a warm-up.
        records: requests in the order of their ends.
        wall_s: time from the first request to the end of the last answer.
        resident_bytes: memory of the server before the run, after each tenth of the requests, and at the end; empty if
            its process is not known.
        bad_client_result: result of badly behaved clients during the run.
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
    """Run a workload on each server in turn; the order alternates, so that no server has an advantage.

    Args:
        sides: the servers; all but one are idle at any time.
        load: the workload.
        warmup: number of uncounted repetitions.
        repeat: number of counted repetitions.
        misbehaviour: badly behaved clients during counted repetitions.
        progress: callback for each finished request.
    """
    runs: list[ServingRun] = []
    for repetition in range(-warmup, repeat):
        bad_clients = misbehaviour if repetition >= 0 else None
        for side in sides if repetition % 2 == 0 else sides[::-1]:
            runs.append(run_load(side, load, repetition, bad_clients, progress))
    return runs


def run_load(
    server: ServerUnderTest,
    load: Workload,
    repetition: int = 0,
    misbehaviour: BadClientOptions | None = None,
    progress: Progress = lambda side, record: None,
) -> ServingRun:
    """Run a workload on a server, optionally with badly behaved clients.

    Args:
        server: the server.
        load: the workload.
        repetition: number of the repetition, which changes all messages but the system prompt.
        misbehaviour: badly behaved clients during the run.
        progress: callback for each finished request.
    """
    return asyncio.run(_run(server, load, repetition, misbehaviour, progress))


async def _run(
    server: ServerUnderTest,
    load: Workload,
    repetition: int,
    misbehaviour: BadClientOptions | None,
    progress: Progress,
) -> ServingRun:
    records: list[RequestRecord] = []
    resident = server.resident_bytes()
    every = max(load.requests // SAMPLES, 1)

    def on_end(record: RequestRecord) -> None:
        records.append(record)
        if len(records) % every == 0:
            resident.extend(server.resident_bytes())
        progress(server.side, record)

    numbers = iter(range(load.conversations))
    bad_clients = BadClients(server, misbehaviour) if misbehaviour else None
    async with make_client(server.url, server.api_key) as client:
        bad_task = asyncio.create_task(bad_clients.run()) if bad_clients else None
        started = time.perf_counter()
        await asyncio.gather(*(_client(client, load, repetition, numbers, on_end) for _ in range(load.clients)))
        wall_s = time.perf_counter() - started
        bad_client_result = await bad_task if bad_task else None
    resident.extend(server.resident_bytes())
    return ServingRun(server.side, repetition, tuple(records), wall_s, tuple(resident), bad_client_result)


async def _client(
    client: httpx2.AsyncClient, load: Workload, repetition: int, numbers: Iterator[int], on_end: OnEnd
) -> None:
    """Run conversations until none is left."""
    for number in numbers:
        messages: Messages = []
        if load.shared_tokens:
            messages.append({"role": "system", "content": load.system_prompt(repetition)})
        for turn in range(load.turns):
            message, tokens = load.user_message(repetition, number, turn)
            messages.append({"role": "user", "content": message})
            record = await send_request(
                client, make_body(messages, tokens, stream=load.stream), RequestRecord(number, turn, tokens)
            )
            on_end(record)
            if record.error is not None:
                break
            messages.append({"role": "assistant", "content": record.text})

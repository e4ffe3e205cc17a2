"""Messages of a pipeline: one per rank and step, no collective, and always in order.

The ranks are threads here, and their links are queues; tests/ranks has real ones.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import EngineError, RingError
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.pipeline_communicator import PipelineCommunicator
from kimi_mlx.parallel.placement import place
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.layer_plan import split_granularity_of
from kimi_mlx.weights.reader import open_checkpoint
from tests.divisible import make_prompt, write_divisible

PATIENCE_S = 60
"""Timeout of a message."""

Links = list["queue.SimpleQueue[np.ndarray]"]


class CountingLinks:
    """One rank of a circle of queues, without collectives for steps."""

    def __init__(self, rank: int, links: Links):
        self.rank, self.size = rank, len(links)
        self._links = links
        self.sent = self.received = 0

    def send(self, x: mx.array, rank: int) -> mx.array:
        assert rank == (self.rank + 1) % self.size
        self.sent += 1
        self._links[rank].put(np.array(x))
        return x

    def recv(self, like: mx.array, rank: int) -> mx.array:
        assert rank == (self.rank - 1) % self.size
        self.received += 1
        message = mx.array(self._links[self.rank].get(timeout=PATIENCE_S))
        assert (message.shape, message.dtype) == (like.shape, like.dtype)
        return message

    def sum(self, x: mx.array) -> mx.array:
        raise AssertionError("a pipeline sums nothing")

    def gather(self, x: mx.array) -> mx.array:
        assert not self.sent + self.received, "a pipeline gathers nothing but its limits, before the first step"
        return x[None]  # all are on this machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_divisible(tmp_path_factory.mktemp("pipeline"), "k2", layers=4)


Found = dict[int, list[int]]
Work = Callable[[Engine, Found], None]


def run_ranks(folder: Path, size: int, work: Work, **options: Any) -> tuple[list[Found], list[CountingLinks]]:
    """Run the same function on each rank in a thread; return the tokens that each rank learned, and the links."""
    config = load_config(folder)
    placement = place(
        config, "pipeline", size, split_granularity_of(open_checkpoint(folder, config).checkpoint, "pipeline")
    )
    queues: Links = [queue.SimpleQueue() for _ in range(size)]
    links = [CountingLinks(rank, queues) for rank in range(size)]
    found: list[Found] = [{} for _ in range(size)]
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            communicator = PipelineCommunicator(links[rank], config.hidden_size, mx.float32)
            model = load_model(folder, config, mx.float32, placement.shares[rank], communicator)
            work(Engine(model, prefill_chunk=16, **options), found[rank])
        except BaseException as error:  # raised again below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if failures:
        raise failures[0]
    return found, links


def run_one(folder: Path, work: Work) -> Found:
    """Run the same on a single rank."""
    found: Found = {}
    work(Engine(load_model(folder, load_config(folder), mx.float32), prefill_chunk=16), found)
    return found


def answering(
    requests: Sequence[Request], late: Sequence[Request] = (), cancelled: dict[int, int] | None = None
) -> Work:
    """Answer requests; -1 marks a stop, -2 a cancellation.

    Args:
        requests: requests from the start.
        late: requests added after the sixth step.
        cancelled: id of the request to cancel, by number of steps.
    """

    def work(engine: Engine, found: Found) -> None:
        for number, request in enumerate(requests):
            engine.add(number, request)
        steps = 0
        while not engine.is_idle:
            for number, event in engine.step():
                if isinstance(event, Token):
                    found.setdefault(number, []).append(event.id)
                elif isinstance(event, Finished) and event.reason != "length":
                    found.setdefault(number, []).append({"stop": -1, "cancelled": -2}[event.reason])
            steps += 1
            if cancelled and steps in cancelled:
                engine.cancel(cancelled[steps])
            if steps == 6:
                with pytest.raises(EngineError):
                    engine.add(-1, Request(()))
                for number, request in enumerate(late, start=len(requests)):
                    engine.add(number, request)

    return work


LONG = Request(make_prompt(40, 1), max_tokens=10)
SHORT = Request(make_prompt(5, 2), max_tokens=1)
MIDDLE = Request(make_prompt(20, 3), max_tokens=6)
SAMPLED = Request(make_prompt(3, 4), max_tokens=5, sampling=Sampling(temperature=1.0, seed=3))


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_pipeline_equals_a_single_rank(folder: Path, size: int, speculate: int) -> None:
    stopped = run_one(folder, answering([MIDDLE]))[0][3]
    requests = [SHORT, LONG, replace(MIDDLE, stop_ids=frozenset({stopped})), SHORT]
    work = answering(requests, late=[SAMPLED, SHORT, MIDDLE])
    expected = run_one(folder, work)
    assert expected[2][-1] == -1
    found, _ = run_ranks(folder, size, work, speculate=speculate)
    assert found[0] == expected


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("steps", [2, 14, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (9, 18))])
def test_a_sequence_is_cancelled_between_any_two_steps(folder: Path, steps: int, speculate: int) -> None:
    requests = [LONG, MIDDLE, replace(LONG, prompt=make_prompt(40, 7))]
    expected = run_one(folder, answering(requests))
    for number in (0, 2):
        found, _ = run_ranks(folder, 3, answering(requests, cancelled={steps: number}), speculate=speculate)
        *tokens, end = found[0][number]
        assert end == -2
        assert len(tokens) < len(expected[number])
        assert tokens == expected[number][: len(tokens)]
        assert all(found[0][other] == expected[other] for other in (0, 1, 2) if other != number)


@pytest.mark.parametrize("size", [2, 3])
def test_step_sends_one_message_per_rank(folder: Path, size: int) -> None:
    _, links = run_ranks(folder, size, answering([LONG]))
    steps = 3 + 9  # chunks of the prompt, then tokens after the first; the last rank answers only steps with logits
    assert [(each.sent, each.received) for each in links[:-1]] == [(steps, 10), *[(steps, steps)] * (size - 2)]
    assert (links[-1].sent, links[-1].received) == (10, steps)


def test_data_of_another_step_raises_ring_error(folder: Path) -> None:
    received: list[np.ndarray] = []
    receive = CountingLinks.recv

    def stale(self: CountingLinks, like: mx.array, rank: int) -> mx.array:
        message = receive(self, like, rank)
        if self.rank == 0:
            received.append(np.array(message))
            return mx.array(received[2]) if len(received) == 4 else message
        return message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CountingLinks, "recv", stale)
        patch.setattr("tests.unit.parallel.test_pipeline_communicator.PATIENCE_S", 2)
        with pytest.raises(RingError, match="data of another step"):
            run_ranks(folder, 2, answering([MIDDLE]))

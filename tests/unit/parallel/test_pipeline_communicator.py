"""Messages of a pipeline: one per rank and step, no collective, and always in order.

The ranks are threads here, and their links are queues; tests/ranks has real ones.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine import engine as engine_module
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import EngineError, RingError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import CapturedStates, Model, SequenceSlice
from kimi_mlx.parallel.pipeline_communicator import PipelineCommunicator
from kimi_mlx.parallel.placement import place
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.layer_plan import split_granularity_of
from kimi_mlx.weights.reader import open_checkpoint
from scripts.oracle import Oracle
from tests.divisible import make_prompt, write_divisible
from tests.drafters import RandomPlanner

SLOW = pytest.mark.slow
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


class UnbufferedLinks(CountingLinks):
    """Links without buffers: a sender waits until the receiver takes the message."""

    def send(self, x: mx.array, rank: int) -> mx.array:
        super().send(x, rank)
        deadline = time.monotonic() + PATIENCE_S
        while not self._links[rank].empty():
            assert time.monotonic() < deadline, "the ranks wait for each other"
            time.sleep(0.001)
        return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_divisible(tmp_path_factory.mktemp("pipeline"), "k2", layers=4)


Found = dict[int, list[int]]
Work = Callable[[Engine, Found], None]


def run_ranks(
    folder: Path, size: int, work: Work, captured_layers: Sequence[int] = (), **options: Any
) -> tuple[list[Found], list[CountingLinks]]:
    """Run the same function on each rank in a thread; return the tokens that each rank learned, and the links."""
    found: list[Found] = [{} for _ in range(size)]

    def run(rank: int, model: Model) -> None:
        model.capture(captured_layers)
        work(Engine(model, prefill_chunk=16, **options), found[rank])

    return found, run_models(folder, size, run)


def run_models(
    folder: Path,
    size: int,
    run: Callable[[int, Model], None],
    strategy: str = "pipeline",
    kind: type[CountingLinks] = CountingLinks,
) -> list[CountingLinks]:
    """Run a function of a rank and its share of the model on each rank in a thread; return the links."""
    config = load_config(folder)
    granularity = split_granularity_of(open_checkpoint(folder, config).checkpoint, "pipeline")
    placement = place(config, strategy, size, granularity)
    layers = [share.layers for share in placement.shares]
    queues: Links = [queue.SimpleQueue() for _ in range(size)]
    links = [kind(rank, queues) for rank in range(size)]
    failures: list[BaseException] = []

    def run_rank(rank: int) -> None:
        try:
            communicator = PipelineCommunicator(links[rank], config.hidden_size, mx.float32, layers)
            run(rank, load_model(folder, config, mx.float32, placement.shares[rank], communicator))
        except BaseException as error:  # raised again below
            failures.append(error)

    threads = [threading.Thread(target=run_rank, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if failures:
        raise failures[0]
    return links


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


@pytest.mark.parametrize(("size", "speculate"), [(4, 3), pytest.param(2, 0, marks=SLOW)])
def test_pipeline_equals_a_single_rank(folder: Path, size: int, speculate: int) -> None:
    stopped = run_one(folder, answering([MIDDLE]))[0][3]
    requests = [SHORT, LONG, replace(MIDDLE, stop_ids=frozenset({stopped})), SHORT]
    work = answering(requests, late=[SAMPLED, SHORT, MIDDLE])
    expected = run_one(folder, work)
    assert expected[2][-1] == -1
    found, _ = run_ranks(folder, size, work, speculate=speculate)
    assert found[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("steps", [2, 14, *(pytest.param(steps, marks=pytest.mark.sweep) for steps in (9, 18))])
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


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_follow_the_leader_in_any_order_of_modes(
    folder: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "DraftPlanner", RandomPlanner)
    requests = [SHORT, LONG, replace(LONG, prompt=make_prompt(40, 7), max_tokens=30), MIDDLE]
    work = answering(requests, late=[SAMPLED, SHORT, MIDDLE])
    expected = run_one(folder, work)
    prompts = [*requests, SAMPLED, SHORT, MIDDLE]
    oracle = Oracle({request.prompt: expected[number] for number, request in enumerate(prompts)}, 0.7, 200)
    found, _ = run_ranks(folder, size, work, speculate=4, drafters=[oracle])
    assert found[0] == expected
    assert len(oracle.lengths) > 5
    for number in (1, 2):
        cut, _ = run_ranks(folder, size, answering(requests, cancelled={12: number}), speculate=4, drafters=[oracle])
        assert cut[0][number] in ([*expected[number][: len(cut[0][number]) - 1], -2], expected[number])
        assert all(cut[0][other] == expected[other] for other in range(4) if other != number)


@pytest.mark.parametrize("size", [2, 3])
def test_step_sends_one_message_per_rank(folder: Path, size: int) -> None:
    _, links = run_ranks(folder, size, answering([LONG]))
    steps = 3 + 9  # chunks of the prompt, then tokens after the first; the last rank answers only steps with logits
    assert [(each.sent, each.received) for each in links[:-1]] == [(steps, 10), *[(steps, steps)] * (size - 2)]
    assert (links[-1].sent, links[-1].received) == (10, steps)


STEPS = [[(16, 0)], [(16, 0)], [(16, 0)], [(8, 1)], [(1, 1), (4, 4)], [(4, 0), (1, 1)], [(16, 0)]]
"""Steps as pairs of a length and a number of logits for each sequence; sequences are numbered in their order."""


def run_steps(model: Model, tokens: mx.array) -> list[CapturedStates | None]:
    """Run STEPS on a rank, and compute their logits one step later, as the engine does."""
    caches, found, previous = [model.make_cache(), model.make_cache()], [], None
    for parts in STEPS:
        if isinstance(model.communicator, PipelineCommunicator):
            model.communicator.set_header(0, 0)
        if previous is not None:
            mx.eval(model.logits(previous))
        total = sum(length for length, _ in parts)
        slices = [SequenceSlice(cache, *part) for cache, part in zip(caches, parts, strict=False)]
        hidden = model.hidden(tokens[:, :total], slices)
        mx.eval(hidden, [cache.state for each in caches for cache in each])
        previous = hidden if model.has_head and sum(count for _, count in parts) else None
        found.append(model.captured)
    return found


@pytest.mark.parametrize("kind", [pytest.param(CountingLinks, marks=SLOW), UnbufferedLinks])
@pytest.mark.parametrize(
    ("strategy", "layers"),
    [
        pytest.param("pipeline:1:1", (0, 2, 3), marks=SLOW),
        ("pipeline:3:1", (1, 2)),  # no other rank captures
        pytest.param("pipeline:1:2:1", (1, 2, 3), marks=SLOW),
        ("pipeline:1:1:1:1", (0, 2, 3)),
    ],
)
def test_captured_states_have_the_bits_of_a_single_rank(
    folder: Path, strategy: str, layers: tuple[int, ...], kind: type[CountingLinks]
) -> None:
    config = load_config(folder)
    tokens = mx.array(np.random.default_rng(1).integers(0, config.vocab_size, (1, 16)))
    alone = load_model(folder, config, mx.float32)
    alone.capture(layers)
    expected = [np.array(states.array()) for states in run_steps(alone, tokens) if states is not None]
    assert len(expected) == len(STEPS)
    found: list[np.ndarray] = []

    def run(rank: int, model: Model) -> None:
        model.capture(layers)
        states = run_steps(model, tokens)
        if rank == 0:
            found.extend(np.array(each.array()) for each in states if each is not None)
        else:
            assert states == [None] * len(STEPS)

    run_models(folder, strategy.count(":"), run, strategy, kind)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("speculate", [0, 3])
def test_the_engine_generates_the_same_tokens_while_states_are_captured(folder: Path, speculate: int) -> None:
    work = answering([LONG, MIDDLE, SHORT], late=[SAMPLED, MIDDLE])
    found, _ = run_ranks(folder, 3, work, captured_layers=(0, 2, 3), speculate=speculate)
    assert found[0] == run_one(folder, work)


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

"""Clients take turns: in the queue, and in prefill."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from kimi_mlx.engine.fair_queue import FairQueue
from kimi_mlx.engine.prefill_order import PrefillOrder
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.engine.token_sampler import TokenSampler


def sequence(number: int, client: str, prompt: int = 100) -> Sequence:
    request = Request((1,) * prompt, client=client)
    return Sequence(number, request, 10, cast(TokenSampler, None))


def admit(queue: FairQueue) -> Sequence:
    first = queue.in_turn(queue.clients)[0]
    queue.take(first)
    return first


@pytest.mark.parametrize("seed", range(5))
def test_clients_take_turns_and_each_keeps_its_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queue = FairQueue()
    clients = [str(rng.choice(["a", "b", "c"], p=[0.8, 0.15, 0.05])) for _ in range(60)]
    for number, client in enumerate(clients):
        queue.append(sequence(number, client))
    assert len(queue) == 60
    admitted: list[Sequence] = []
    while queue:
        admitted.append(admit(queue))
    order = [other.request.client for other in admitted]
    for client in set(clients):
        numbers = [other.request_id for other in admitted if other.request.client == client]
        assert numbers == sorted(numbers)
        at = [index for index, other in enumerate(order) if other == client]
        for start, stop in zip([-1, *at], at, strict=False):  # nobody who waits is passed twice by the same client
            assert len(set(order[start + 1 : stop])) == stop - start - 1


def test_one_request_does_not_wait_for_ninety_of_another_client() -> None:
    queue = FairQueue()
    for number in range(90):
        queue.append(sequence(number, "many"))
    admit(queue)
    queue.append(sequence(90, "one"))
    assert {admit(queue).request.client for _ in range(2)} == {"many", "one"}


def test_a_preempted_sequence_comes_first() -> None:
    queue = FairQueue()
    queue.append(sequence(1, "a"))
    queue.append(sequence(2, "b"))
    queue.put_back(sequence(0, "b"))
    assert [other.request_id for other in queue.in_turn(queue.clients)] == [0, 1, 2]
    assert queue.find(2) is not None
    queue.remove(cast(Sequence, queue.find(2)))
    assert queue.find(2) is None
    queue.clear()
    assert not queue


def test_prompts_of_one_client_are_prefilled_one_after_the_other() -> None:
    order = PrefillOrder()
    prompts = [sequence(number, "many", 1000) for number in range(3)] + [sequence(3, "one", 1000)]
    served: list[int] = []
    while prompts:
        first = order.next_prompts(prompts[::-1])[0]
        order.record(first)
        served.append(first.request_id)
        first.num_computed_tokens += 500
        prompts = [other for other in prompts if other.remaining_prompt]
    assert served[:4] in ([0, 3, 0, 3], [3, 0, 3, 0])
    assert [number for number in served if number != 3] == [0, 0, 1, 1, 2, 2]


def test_short_prompts_pass_long_ones_in_every_other_step() -> None:
    order = PrefillOrder()
    prompts = [sequence(0, "a", 1000), sequence(1, "a", 10)]
    assert [[other.request_id for other in order.next_prompts(prompts)] for _ in range(4)] == [[1], [0, 1], [1], [0, 1]]

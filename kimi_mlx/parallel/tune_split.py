"""Decide at the start how queries are divided over the ranks, from measured times of gathers; rank 0 decides for all.

Ranks that divide a step differently deadlock, so all of them use rank 0's numbers.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import astuple
from typing import cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from kimi_mlx.model.decoder import Model
from kimi_mlx.model.query_split import QueryCost, QuerySplit
from kimi_mlx.parallel.all_reduce_choice import AllReduceChoice
from kimi_mlx.parallel.group import Group, barrier, gather_on_host
from kimi_mlx.parallel.sum_communicator import SumCommunicator

GATHERED_TOKENS = (8, 64, 512)
"""Numbers of tokens of a rank's part, where the choice of all-reduce has no times of gathers."""

NUM_ROUNDS = 3


def tune_query_split(group: Group, model: Model, choice: AllReduceChoice | None) -> None:
    """Let the communicator of a model divide queries where that saves time. Collective: call it on all ranks.

    Args:
        group: the ranks.
        model: this rank's share of the model.
        choice: choice of all-reduce on rank 0; None on other ranks, and where none was measured.
    """
    communicator = model.communicator
    if not isinstance(communicator, SumCommunicator) or not communicator.can_divide_queries:
        return
    has_times = int(gather_on_host(group, np.array([choice is not None], np.int32))[0, 0])
    if choice is not None:
        times = [(timing.size_bytes, timing.gather_s) for timing in choice.timings]
    elif has_times:
        times = []  # on rank 0
    else:
        times = _time_gathers(group, model)
    attention = model.layers[0].self_attn
    weights_bytes = sum(cast(mx.array, array).nbytes for _, array in tree_flatten(attention.parameters()))
    cost = QueryCost.of(model.config, model.attention_cost, weights_bytes)
    numbers = _of_leader(group, [*astuple(cost), *(number for pair in times for number in pair)])
    split = len(astuple(cost))
    gathers = tuple(zip(numbers[split::2], numbers[split + 1 :: 2], strict=True))
    token_bytes = model.config.hidden_size * model.dtype.size
    communicator.query_split = QuerySplit(group.size, QueryCost(*numbers[:split]), token_bytes, gathers)


def _time_gathers(group: Group, model: Model) -> list[tuple[float, float]]:
    """Return (bytes of a rank's part, median seconds) of gathers as in a model: of a value that was just computed."""
    times: list[tuple[float, float]] = []
    for tokens in GATHERED_TOKENS:
        x = mx.zeros((tokens, model.config.hidden_size), model.dtype)
        seconds: list[float] = []
        for _ in range(NUM_ROUNDS):
            barrier(group)  # so that no GPU operation waits long for a late rank
            begin = time.perf_counter()
            mx.eval(group.gather(x + 0) + 0)
            seconds.append(time.perf_counter() - begin)
        times.append((x.nbytes, statistics.median(seconds)))
    return times


def _of_leader(group: Group, numbers: list[float]) -> list[float]:
    """Return the numbers of rank 0; other ranks may have another count. Float32."""
    [count] = gather_on_host(group, np.array([len(numbers)], np.int32))[0]
    padded = np.zeros(count, np.float32)
    if group.rank == 0:
        padded[:] = numbers
    return gather_on_host(group, padded)[0].tolist()

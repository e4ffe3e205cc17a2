"""The process of a rank that measures a layer of a model and messages of its size, before the placement is chosen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.weight import Linear
from kimi_mlx.parallel.all_reduce import tune_all_reduce
from kimi_mlx.parallel.group import Group, MlxGroup, barrier
from kimi_mlx.planner.calibration import MANY_TOKENS, read_dimensions
from kimi_mlx.rank.channel import Channel, run_rank
from kimi_mlx.rank.rendezvous import join_group
from kimi_mlx.runtime.load import compute_dtype, prepare_device
from kimi_mlx.runtime.sample_layer import sample_head, sample_model

NUM_LAYERS = 4
"""Layers per step of one token: with a single layer, the start of a step would count too much."""

CACHED_TOKENS = 32
"""Tokens in the caches of that step."""

MIN_ROUNDS, MAX_ROUNDS = 5, 20
"""Number of rounds of short work: the minimum, and the maximum within TIME_LIMIT_S."""

MESSAGE_ROUNDS = 20
"""Number of rounds of messages, the same on all ranks."""

TIME_LIMIT_S = 0.4
"""Time for the rounds of one measurement."""

LONG_LIMIT_S = 1.0
"""Time for all rounds with MANY_TOKENS tokens; no round starts later."""

SUMS_PER_ROUND = 2
"""Collectives timed as one: with a single one, a late rank finds all data already received and seems fast."""


def main() -> None:
    """Run a rank."""
    run_rank(serve)


def serve(channel: Channel, start: Message) -> None:
    """Join, measure, send the result as `done`, and wait for a command, so that no peer loses its neighbour."""
    prepare_device()
    group = join_group(channel, start)
    config = read_dimensions(start["dimensions"])
    dtype = compute_dtype(start["dtype"], config)
    channel.report_progress("calibration")
    report = {
        "layers": _layer_times(group, config, dtype),
        "heads": {
            "single": _head_s(group, config, dtype, 1),
            "split": _head_s(group, config, dtype, group.size),
        },
        **_message_times(group, config.hidden_size, dtype),
    }
    channel.report_progress("idle")
    channel.send("done", **report)
    channel.next_command()


def _shares(config: ModelConfig, size: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the name of each strategy and the arguments of sample_model for a rank's share of it."""
    shares: list[tuple[str, dict[str, Any]]] = [("single", {})]
    if size > 1:
        shares.append(("hybrid", {"num_shares": size}))
        if config.num_attention_heads % size == 0:
            shares.append(("tensor", {"num_shares": size, "has_all_heads": False}))
    return shares


def _layer_times(group: Group, config: ModelConfig, dtype: mx.Dtype) -> dict[str, tuple[float, float]]:
    """Return the seconds of a layer for 1 token and for MANY_TOKENS tokens, by strategy.

    The strategies take turns, so that interference affects all of them. The ranks measure a whole layer one after the
    other: in a pipeline only one of them computes for a sequence, and ranks that share a machine slow each other down.
    """
    shares = _shares(config, group.size)
    fewest: dict[str, float] = {}
    for name, share in shares:
        # While one step is computed, the next graph is built, unless both need the processor core of a rank.
        counts_building = name != "single" and _is_cpu()
        fewest[name] = _measure_steps(group, name, sample_model(config, dtype, NUM_LAYERS, **share), counts_building)
    models = {name: sample_model(config, dtype, 1, **share) for name, share in shares}
    whole, split = models.pop("single"), models
    many = {"single": _in_turn(group, lambda: _fastest_of_many({"single": whole})["single"])}
    if split:
        barrier(group)
        many |= _fastest_of_many(split)
    return {name: (fewest[name] / NUM_LAYERS, many[name]) for name, _ in shares}


def _measure_steps(group: Group, name: str, model: Model, counts_building: bool) -> float:
    """Return the seconds of a step of one token."""

    def measure() -> float:
        return _fastest(lambda: _step(model, 1), counts_building=counts_building)

    if name == "single":
        return _in_turn(group, measure)
    mx.eval(_step(model, 1))
    barrier(group)
    return measure()


def _fastest_of_many(models: Mapping[str, Model]) -> dict[str, float]:
    """Return the seconds of a step of MANY_TOKENS tokens; the models take turns."""
    many = dict.fromkeys(models, math.inf)
    begin = time.perf_counter()
    for _ in range(MAX_ROUNDS):
        for name, model in models.items():
            many[name] = min(many[name], _seconds(lambda model=model: _step(model, MANY_TOKENS), _clock()))
        if time.perf_counter() - begin > LONG_LIMIT_S:
            break
    return many


def _in_turn(group: Group, measure: Callable[[], float]) -> float:
    """Measure on one rank after the other; return this rank's result. The others wait."""
    seconds = 0.0
    for rank in range(group.size):
        barrier(group)
        if rank == group.rank:
            seconds = measure()
    barrier(group)
    return seconds


def _step(model: Model, tokens: int) -> mx.array:
    """Return the hidden states of a step of one sequence."""
    cache = model.make_cache()
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    if tokens == 1:
        for layer_cache in cache:
            layer_cache.append(mx.zeros((1, 1, CACHED_TOKENS, width), model.dtype))
    return model.hidden(mx.zeros((1, tokens), mx.int32), [SequenceSlice(cache, tokens, tokens)])


def _head_s(group: Group, config: ModelConfig, dtype: mx.Dtype, num_shares: int) -> float:
    head = Linear(sample_head(config, dtype, num_shares))
    x = mx.ones((1, 1, config.hidden_size), dtype)
    mx.eval(head(x))
    barrier(group)
    return _fastest(lambda: head(x))


def _message_times(group: Group, width: int, dtype: mx.Dtype) -> dict[str, tuple[float, float]]:
    """Return the seconds of a sum, a gather and a message to the next rank, for 1 token and for MANY_TOKENS tokens."""
    if not isinstance(group, MlxGroup):
        return dict.fromkeys(("sums", "gathers", "hops"), (0.0, 0.0))
    tune_all_reduce(group, width, dtype)
    inputs = [mx.ones((tokens, width), dtype) for tokens in (1, MANY_TOKENS)]

    def sums(x: mx.array) -> mx.array:
        for _ in range(SUMS_PER_ROUND):
            x = group.sum(x + 0) * (1 / group.size)
        return x

    def gathers(x: mx.array) -> mx.array:
        for _ in range(SUMS_PER_ROUND):
            x = group.gather(x + 0)[0]
        return x

    def circle(x: mx.array) -> mx.array:
        if group.rank == 0:
            mx.eval(group.send(x + 0, 1))
            return group.recv(x, group.size - 1) + 0
        received = group.recv(x, group.rank - 1) + 0
        mx.eval(received)
        return group.send(received, (group.rank + 1) % group.size)

    kinds: dict[str, tuple[Callable[[mx.array], mx.array], int]] = {
        "sums": (sums, SUMS_PER_ROUND),
        "gathers": (gathers, SUMS_PER_ROUND),
        "hops": (circle, group.size),
    }
    times = {
        name: [_fastest_message(group, lambda x=x, work=work: work(x)) / count for x in inputs]
        for name, (work, count) in kinds.items()
    }
    times["hops"] = [seconds if group.rank == 0 else 0.0 for seconds in times["hops"]]  # others start late
    return {name: (pair[0], pair[1]) for name, pair in times.items()}


def _fastest(work: Callable[[], mx.array], *, counts_building: bool = True) -> float:
    """Return the seconds of the fastest of several rounds of a computation."""
    mx.eval(work())  # compiles kernels and allocates memory
    begin = time.perf_counter()
    seconds: list[float] = []
    while len(seconds) < MIN_ROUNDS or (len(seconds) < MAX_ROUNDS and time.perf_counter() - begin < TIME_LIMIT_S):
        seconds.append(_seconds(work, _clock(), counts_building=counts_building))
    return min(seconds)


def _fastest_message(group: Group, work: Callable[[], mx.array]) -> float:
    """Return the seconds of the fastest of MESSAGE_ROUNDS rounds of collectives."""
    mx.eval(work())
    barrier(group)
    return min(_seconds(work, time.perf_counter) for _ in range(MESSAGE_ROUNDS))


def _seconds(work: Callable[[], mx.array], clock: Callable[[], float], *, counts_building: bool = True) -> float:
    begin = clock()
    result = work()
    built = clock()
    mx.eval(result)
    return clock() - (begin if counts_building else built)


def _clock() -> Callable[[], float]:
    """Return the clock of computations: on a CPU the time of this process, which other programs do not change."""
    return time.process_time if _is_cpu() else time.perf_counter


def _is_cpu() -> bool:
    return device_kind() == "cpu"

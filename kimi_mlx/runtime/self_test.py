"""One rank's process of the doctor's self-test: joins the others, sums and gathers what must come out exactly."""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import mlx.core as mx

from kimi_mlx.cluster.messages import Message
from kimi_mlx.cluster.payloads import Payload, p99
from kimi_mlx.parallel.group import Group
from kimi_mlx.runtime.channel import Channel, run_rank
from kimi_mlx.runtime.joining import join

ROUNDS = 4
"""How often each payload is checked, in turns with the others."""

EXACT_LIMIT = 256
"""Whole numbers up to this are exact in bfloat16."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def main() -> None:
    """Run the test; then wait until the input ends, so that no peer is lost."""
    run_rank(serve)


def serve(channel: Channel, start: Message) -> None:
    """Join, check, time; says `done`."""
    group = join(channel, start)
    device = str(mx.default_device()).removeprefix("Device").strip("()").partition(",")[0]
    payloads = [Payload.from_dict(value) for value in start["payloads"]]
    wrong = check(group, payloads, channel)
    timings = measure(group, payloads, channel)
    channel.made_step("idle")
    channel.send("done", device=device, wrong=wrong, timings=timings)
    channel.next_command()


def pattern(payload: Payload, rank: int, turn: int, size: int) -> mx.array:
    """What a rank sends: whole numbers, other ones each time, whose sum over the ranks is exact in every type."""
    most = max(EXACT_LIMIT // size, 2)
    numbers = mx.arange(payload.tokens * payload.width, dtype=mx.int32)
    mixed = numbers * (2 * rank + 3) + numbers // 5 * (rank + 1) + 5 * turn
    return (mixed % most).reshape(payload.tokens, payload.width)


def expected(payload: Payload, turn: int, size: int) -> mx.array:
    """What every rank must get, as whole numbers."""
    parts = [pattern(payload, rank, turn, size) for rank in range(size)]
    stacked = mx.stack(parts)
    return stacked.sum(axis=0) if payload.kind == "sum" else stacked


def collective(group: Group, payload: Payload, x: mx.array) -> mx.array:
    """The collective as a model has it: of what was just computed, and computed with at once."""
    return (group.sum(x + 0) if payload.kind == "sum" else group.gather(x + 0)) + 0


def compare(group: Group, payload: Payload, turn: int, result: mx.array) -> dict[str, Any] | None:
    """What is wrong with a result: how many values, and of a gather which ranks' parts; None if nothing is."""
    is_wrong = result.astype(mx.float32) != expected(payload, turn, group.size).astype(mx.float32)
    count = int(cast(int, is_wrong.sum().item()))
    if not count:
        return None
    rows = cast("list[bool]", is_wrong.any(axis=(1, 2)).tolist()) if payload.kind == "gather" else []
    sources = [rank for rank, row in enumerate(rows) if row]
    return {"payload": payload.name, "count": count, "of": is_wrong.size, "sources": sources}


def check(group: Group, payloads: list[Payload], channel: Channel) -> list[dict[str, Any]]:
    """Every payload in turns, several rounds; what was wrong, at most once a payload."""
    wrong: dict[str, dict[str, Any]] = {}
    for turn in range(ROUNDS):
        for payload in payloads:
            if turn >= payload.repeats:
                continue
            channel.made_step(payload.name)
            x = pattern(payload, group.rank, turn, group.size).astype(DTYPES[payload.dtype])
            mx.eval(x)
            result = collective(group, payload, x)
            mx.eval(result)
            found = compare(group, payload, turn, result)
            if found is not None:
                wrong.setdefault(payload.name, found)
    return list(wrong.values())


def measure(group: Group, payloads: list[Payload], channel: Channel) -> list[dict[str, float]]:
    """The median and the 99th percentile of each payload's time, in turns with the others."""
    inputs = [pattern(each, group.rank, 0, group.size).astype(DTYPES[each.dtype]) for each in payloads]
    mx.eval(inputs)
    seconds: list[list[float]] = [[] for _ in payloads]
    for turn in range(max(each.repeats for each in payloads)):
        for payload, x, taken in zip(payloads, inputs, seconds, strict=True):
            if turn >= payload.repeats:
                continue
            channel.made_step(payload.name)
            begin = time.perf_counter()
            mx.eval(collective(group, payload, x))
            taken.append(time.perf_counter() - begin)
    return [{"median_s": statistics.median(each), "p99_s": p99(each), "count": len(each)} for each in seconds]

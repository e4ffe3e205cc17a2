"""One rank's process of the doctor's self-test: joins the others, sums and gathers what must come out exactly."""

from __future__ import annotations

import statistics
import time

import mlx.core as mx

from kimi_mlx.cluster.doctor.payloads import Payload, p99
from kimi_mlx.cluster.ring.messages import Message
from kimi_mlx.parallel.group import Group
from kimi_mlx.parallel.sums import choose_sums
from kimi_mlx.rank.channel import Channel, run_rank
from kimi_mlx.rank.link_test import DTYPES, check, exchange, pattern
from kimi_mlx.rank.rendezvous import join

ROUNDS = 4
"""How often each payload is checked, in turns with the others."""


def main() -> None:
    """Run the test; then wait until the input ends, so that no peer is lost."""
    run_rank(serve)


def serve(channel: Channel, start: Message) -> None:
    """Join, check, time; says `done`."""
    group = join(channel, start)
    device = mx.default_device().type.name
    payloads = [Payload.from_dict(value) for value in start["payloads"]]
    channel.report_progress("choice of sums")
    choice = choose_sums(group, start["hidden_size"], DTYPES["bfloat16" if device == "gpu" else "float32"])
    mismatches = check(group, payloads, ROUNDS, channel.report_progress)
    timings = measure(group, payloads, channel)
    channel.report_progress("idle")
    sums = None if choice is None else choice.to_dict()
    channel.send("done", device=device, mismatches=mismatches, timings=timings, all_reduce=sums)
    channel.next_command()


def measure(group: Group, payloads: list[Payload], channel: Channel) -> list[dict[str, float]]:
    """The median and the 99th percentile of each payload's time, in turns with the others."""
    inputs = [pattern(each, group.rank, 0, group.size).astype(DTYPES[each.dtype]) for each in payloads]
    mx.eval(inputs)
    seconds: list[list[float]] = [[] for _ in payloads]
    for turn in range(max(each.repeats for each in payloads)):
        for payload, x, taken in zip(payloads, inputs, seconds, strict=True):
            if turn >= payload.repeats:
                continue
            channel.report_progress(payload.name)
            begin = time.perf_counter()
            exchange(group, payload, x)
            taken.append(time.perf_counter() - begin)
    return [{"median_s": statistics.median(each), "p99_s": p99(each), "count": len(each)} for each in seconds]

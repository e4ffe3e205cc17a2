"""The process of a rank during the doctor's self-test: exchange payloads with known results, and time them."""

from __future__ import annotations

import statistics
import time

import mlx.core as mx

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.doctor.payloads import Payload, p99
from kimi_mlx.parallel.all_reduce import tune_all_reduce
from kimi_mlx.parallel.group import Group
from kimi_mlx.rank.channel import Channel, run_rank
from kimi_mlx.rank.link_test import PAYLOAD_DTYPES, check_links, exchange, pattern
from kimi_mlx.rank.rendezvous import join_group

NUM_ROUNDS = 4
"""Number of checks per payload."""


def main() -> None:
    """Run a rank."""
    run_rank(serve)


def serve(channel: Channel, start: Message) -> None:
    """Join, check and time, send the result as `done`, and wait for the end, so that no peer loses its neighbour."""
    group = join_group(channel, start)
    device = mx.default_device().type.name
    payloads = [Payload.from_dict(value) for value in start["payloads"]]
    channel.report_progress("choice of all-reduce")
    dtype = PAYLOAD_DTYPES["bfloat16" if device == "gpu" else "float32"]
    choice = tune_all_reduce(group, start["hidden_size"], dtype)
    mismatches = check_links(group, payloads, NUM_ROUNDS, channel.report_progress)
    timings = measure(group, payloads, channel)
    channel.report_progress("idle")
    all_reduce = None if choice is None else choice.to_dict()
    channel.send("done", device=device, mismatches=mismatches, timings=timings, all_reduce=all_reduce)
    channel.next_command()


def measure(group: Group, payloads: list[Payload], channel: Channel) -> list[dict[str, float]]:
    """Return the median and the 99th percentile of each payload's time. The payloads are interleaved."""
    inputs = [pattern(payload, group.rank, 0, group.size).astype(PAYLOAD_DTYPES[payload.dtype]) for payload in payloads]
    mx.eval(inputs)
    seconds: list[list[float]] = [[] for _ in payloads]
    for round_index in range(max(payload.repeats for payload in payloads)):
        for payload, x, times in zip(payloads, inputs, seconds, strict=True):
            if round_index >= payload.repeats:
                continue
            channel.report_progress(payload.name)
            start = time.perf_counter()
            exchange(group, payload, x)
            times.append(time.perf_counter() - start)
    return [{"median_s": statistics.median(times), "p99_s": p99(times), "count": len(times)} for times in seconds]

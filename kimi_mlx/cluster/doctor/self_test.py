"""Self-test of a cluster: start a process per rank, and exchange data of the model's sizes and types.

The processes start and connect like the ranks of a model (kimi_mlx.cluster.ring.ring). Their heartbeats report
progress; their last message (`done`) has the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.doctor.payloads import Payload
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.ring.link_diagnosis import find_corrupt_links
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.cluster.ring.watch import RingTimeouts
from kimi_mlx.errors import RingError, SshError, StallError
from kimi_mlx.parallel.all_reduce_choice import AllReduceChoice

MODULE = "kimi_mlx.rank.self_test"

STEP_LIMIT_S = 8.0
"""Time limit without progress by any rank, in addition to the time of the slowest step."""


@dataclass(frozen=True)
class Timing:
    """Time of a payload on the slowest rank."""

    payload: Payload
    median_s: float
    p99_s: float
    count: int

    @property
    def bytes_per_s(self) -> float:
        """Rate, counting the bytes of one rank."""
        return self.payload.size_bytes / self.median_s


@dataclass(frozen=True)
class SelfTest:
    """Result of the self-test.

    Args:
        findings: one finding; several if several links corrupt data.
        timings: times of all payloads; empty if the test failed.
        device: device on which the ranks compute, such as `gpu`.
        sums: how the ranks sum; None for a single rank.
        is_stalled: whether the ranks waited for each other, because a link is dead.
    """

    findings: tuple[Finding, ...]
    timings: tuple[Timing, ...] = ()
    device: str = ""
    sums: AllReduceChoice | None = None
    is_stalled: bool = False


def self_test(cluster: Cluster, payloads: Sequence[Payload], hidden_size: int, step_s: float = 0.0) -> SelfTest:
    """Run the self-test. It leaves no process on any host, even if it fails.

    Args:
        cluster: hosts and addresses of the ranks.
        payloads: data to exchange.
        hidden_size: values per token that ranks sum.
        step_s: longest time that an exchange may take.
    """
    with closing(Ring(cluster, RingTimeouts(stall_s=STEP_LIMIT_S + step_s), MODULE)) as ring:
        try:
            ring.start(payloads=[payload.to_dict() for payload in payloads], hidden_size=hidden_size)
            done = _results(ring)
        except (RingError, SshError) as error:
            hosts = cluster.names if error.rank is None else [cluster.hostfile.hosts[error.rank].ssh]
            finding = Finding(", ".join(hosts), "self-test", "problem", error.message, error.hint)
            return SelfTest((finding,), is_stalled=isinstance(error, StallError))
    timings = tuple(_slowest(payload, index, done) for index, payload in enumerate(payloads))
    corrupt_links = find_corrupt_links(cluster, {rank: message["mismatches"] for rank, message in done.items()})
    findings = tuple(
        Finding(cluster.hostfile.hosts[link.rank].ssh, "self-test", "problem", link.message, link.hint)
        for link in corrupt_links
    )
    sums = done[0]["all_reduce"] and AllReduceChoice.from_dict(done[0]["all_reduce"])
    return SelfTest(findings or (_passed(cluster, timings),), timings, str(done[0]["device"]), sums)


def _results(ring: Ring) -> dict[int, Message]:
    done: dict[int, Message] = {}
    for rank, message in ring.messages():
        if message["kind"] == "done":
            done[rank] = message
        if len(done) == ring.world_size:
            break
    return done


def _passed(cluster: Cluster, timings: Sequence[Timing]) -> Finding:
    hosts = ", ".join(cluster.names)
    if cluster.size == 1:
        return Finding(hosts, "self-test", "ok", "MLX starts and runs")
    count = sum(timing.count for timing in timings)
    message = f"{cluster.size} ranks over {cluster.backend}: {len(timings)} payloads correct, {count} exchanges timed"
    return Finding(hosts, "self-test", "ok", message)


def _slowest(payload: Payload, index: int, done: Mapping[int, Message]) -> Timing:
    timings = [message["timings"][index] for message in done.values()]
    median_s, p99_s = (max(float(timing[name]) for timing in timings) for name in ("median_s", "p99_s"))
    return Timing(payload, median_s, p99_s, int(timings[0]["count"]))

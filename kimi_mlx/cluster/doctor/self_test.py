"""The self-test of a cluster: a process on each rank's host, which exchange what the model will exchange.

They start and join as the ranks of a model do (kimi_mlx.cluster.ring.ring), then work; each heartbeat reports their
progress, and the last message (`done`) their results.
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
"""Without a step by anybody, on top of what the slowest step may take."""


@dataclass(frozen=True)
class Timing:
    """How long a payload took, on the slowest rank."""

    payload: Payload
    median_s: float
    p99_s: float
    count: int

    @property
    def bytes_per_s(self) -> float:
        """Of a rank's part."""
        return self.payload.size_bytes / self.median_s


@dataclass(frozen=True)
class SelfTest:
    """What came of it.

    Args:
        findings: one in the end, several if several ranks got something wrong.
        timings: of all payloads; none if it came to nothing.
        device: on which the ranks compute, such as `gpu`.
        sums: how they make sums; None for a rank alone.
        is_stalled: the ranks waited for each other; some link is dead.
    """

    findings: tuple[Finding, ...]
    timings: tuple[Timing, ...] = ()
    device: str = ""
    sums: AllReduceChoice | None = None
    is_stalled: bool = False


def self_test(cluster: Cluster, payloads: Sequence[Payload], hidden_size: int, step_s: float = 0.0) -> SelfTest:
    """Run it; nothing is left of it on any host, whatever happens.

    Args:
        cluster: the ranks, with the addresses to use.
        payloads: what they exchange.
        hidden_size: values that they sum, a token.
        step_s: how long the slowest exchange may take.
    """
    with closing(Ring(cluster, RingTimeouts(stall_s=STEP_LIMIT_S + step_s), MODULE)) as ring:
        try:
            ring.start(payloads=[payload.to_dict() for payload in payloads], hidden_size=hidden_size)
            done = _results(ring)
        except (RingError, SshError) as error:
            hosts = cluster.names if error.rank is None else [cluster.hostfile.hosts[error.rank].ssh]
            finding = Finding(", ".join(hosts), "self-test", "problem", error.message, error.hint)
            return SelfTest((finding,), is_stalled=isinstance(error, StallError))
    timings = tuple(_slowest(payload, number, done) for number, payload in enumerate(payloads))
    found = find_corrupt_links(cluster, {rank: message["mismatches"] for rank, message in done.items()})
    findings = tuple(
        Finding(cluster.hostfile.hosts[each.rank].ssh, "self-test", "problem", each.message, each.hint)
        for each in found
    )
    sums = done[0]["all_reduce"] and AllReduceChoice.from_dict(done[0]["all_reduce"])
    return SelfTest(findings or (_right(cluster, timings),), timings, str(done[0]["device"]), sums)


def _results(ring: Ring) -> dict[int, Message]:
    done: dict[int, Message] = {}
    for rank, message in ring.messages():
        if message["kind"] == "done":
            done[rank] = message
        if len(done) == ring.world_size:
            break
    return done


def _right(cluster: Cluster, timings: Sequence[Timing]) -> Finding:
    hosts = ", ".join(cluster.names)
    if cluster.size == 1:
        return Finding(hosts, "self-test", "ok", "MLX starts and computes")
    count = sum(each.count for each in timings)
    over = f"{cluster.size} ranks over {cluster.backend}"
    message = f"{over}: {len(timings)} payloads right, {count} timed"
    return Finding(hosts, "self-test", "ok", message)


def _slowest(payload: Payload, number: int, done: Mapping[int, Message]) -> Timing:
    timings = [message["timings"][number] for message in done.values()]
    median_s, p99_s = (max(float(each[name]) for each in timings) for name in ("median_s", "p99_s"))
    return Timing(payload, median_s, p99_s, int(timings[0]["count"]))

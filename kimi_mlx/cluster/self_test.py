"""The self-test of a cluster: a process on each rank's host, which exchange what the model will exchange.

They start and join as the ranks of a model do (kimi_mlx.cluster.ring), then work, saying with each heartbeat how far
they are, and in the end what they have found (`done`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kimi_mlx.cluster.findings import Finding
from kimi_mlx.cluster.hosts import Cluster
from kimi_mlx.cluster.messages import Message
from kimi_mlx.cluster.payloads import Payload
from kimi_mlx.cluster.ring import Ring
from kimi_mlx.cluster.watch import Limits
from kimi_mlx.errors import RingError, SshError, StallError

MODULE = "kimi_mlx.runtime.self_test"

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
        is_stalled: the ranks waited for each other; some link is dead.
    """

    findings: tuple[Finding, ...]
    timings: tuple[Timing, ...] = ()
    device: str = ""
    is_stalled: bool = False


def self_test(cluster: Cluster, payloads: Sequence[Payload], step_s: float = 0.0) -> SelfTest:
    """Run it; nothing is left of it on any host, whatever happens.

    Args:
        cluster: the ranks, with the addresses to use.
        payloads: what they exchange.
        step_s: how long the slowest exchange may take.
    """
    with closing(Ring(cluster, Limits(stall_s=STEP_LIMIT_S + step_s), MODULE)) as ring:
        try:
            ring.start(payloads=[payload.to_dict() for payload in payloads])
            done = _results(ring)
        except (RingError, SshError) as error:
            hosts = cluster.names if error.rank is None else [cluster.hostfile.hosts[error.rank].ssh]
            finding = Finding(", ".join(hosts), "self-test", "trouble", error.message, error.hint)
            return SelfTest((finding,), is_stalled=isinstance(error, StallError))
    timings = tuple(_slowest(payload, number, done) for number, payload in enumerate(payloads))
    findings = tuple(chain.from_iterable(_wrong(cluster, rank, done[rank]["wrong"]) for rank in sorted(done)))
    return SelfTest(findings or (_right(cluster, timings),), timings, str(done[0]["device"]))


def _results(ring: Ring) -> dict[int, Message]:
    done: dict[int, Message] = {}
    for rank, message in ring.messages():
        if message["kind"] == "done":
            done[rank] = message
        if len(done) == ring.world_size:
            break
    return done


def _wrong(cluster: Cluster, rank: int, wrong: Sequence[Mapping[str, Any]]) -> list[Finding]:
    if not wrong:
        return []
    size = cluster.size
    before = f"from {_name(cluster, (rank - 1) % size)}" if cluster.backend == "ring" else "from its peers"
    sources = sorted({source for each in wrong for source in each["sources"]})
    of = f"; parts of {', '.join(_name(cluster, source) for source in sources)}" if sources else ""
    first = wrong[0]
    message = (
        f"{_name(cluster, rank)} got wrong results of {len(wrong)} payloads; first, the {first['payload']}: "
        f"{first['count']} of {first['of']} values; its data come {before}{of}"
    )
    remedy = "the link or MLX corrupts data: try another cable or port, `--backend ring`, the newest MLX on all"
    return [Finding(cluster.hostfile.hosts[rank].ssh, "self-test", "trouble", message, remedy)]


def _right(cluster: Cluster, timings: Sequence[Timing]) -> Finding:
    hosts = ", ".join(cluster.names)
    if cluster.size == 1:
        return Finding(hosts, "self-test", "ok", "MLX starts and computes")
    count = sum(each.count for each in timings)
    over = f"{cluster.size} ranks over {cluster.backend}"
    message = f"{over}: {len(timings)} payloads right, {count} timed"
    return Finding(hosts, "self-test", "ok", message)


def _name(cluster: Cluster, rank: int) -> str:
    host = f"`{cluster.hostfile.hosts[rank].ssh}`"
    return host if len(cluster.names) > 1 else f"rank {rank} on {host}"


def _slowest(payload: Payload, number: int, done: Mapping[int, Message]) -> Timing:
    timings = [message["timings"][number] for message in done.values()]
    median_s, p99_s = (max(float(each[name]) for each in timings) for name in ("median_s", "p99_s"))
    return Timing(payload, median_s, p99_s, int(timings[0]["count"]))

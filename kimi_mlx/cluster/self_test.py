"""The self-test of a cluster: a process on each rank's host, which exchange what the model will exchange.

Each rank is told who it is (`start`), answers with a free port of its own address (`listening`), gets the addresses of
all (`join`), joins (`joined`) and works; twice a second it says how far it is (`at`), in the end what it has found
(`done`). All limits are kept here: a ring that has lost a peer waits for ever, and may do so with Python's lock held.
"""

from __future__ import annotations

import os
import queue
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kimi_mlx.cluster.backends import backend_file, coordinator
from kimi_mlx.cluster.findings import Finding
from kimi_mlx.cluster.guard import guard_command
from kimi_mlx.cluster.hosts import Backend, Hostfile
from kimi_mlx.cluster.launch import without_ring
from kimi_mlx.cluster.messages import Message
from kimi_mlx.cluster.payloads import Payload
from kimi_mlx.cluster.process import RankProcess, end_all
from kimi_mlx.cluster.rdma import explain_jaccl
from kimi_mlx.cluster.ssh import is_local, quote_word, script_command, ssh_command

MODULE = "kimi_mlx.runtime.self_test"

START_LIMIT_S = 40.0
"""Until each process has found its port: logging in, and importing MLX for the first time."""

JOIN_LIMIT_S = 15.0
"""Until all have joined."""

STEP_LIMIT_S = 8.0
"""Without a step by anybody, on top of what the slowest step may take."""

WHOLE_LIMIT_S = 180.0
"""After which the processes end by themselves, should nobody be left to end them."""

CAUSE_WAIT_S = 0.5
"""How long to wait, when a rank has ended, for what others have to say."""

END_PATIENCE_S = 2.0
"""How long a process may take to end when its input is closed."""


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


def self_test(
    hostfile: Hostfile, backend: Backend, pythons: Mapping[str, str], payloads: Sequence[Payload], step_s: float = 0.0
) -> SelfTest:
    """Run it; nothing is left of it on any host, whatever happens.

    Args:
        hostfile: the ranks, with the addresses to use.
        backend: how they talk.
        pythons: host -> its interpreter.
        payloads: what they exchange.
        step_s: how long the slowest exchange may take.
    """
    run = _Run(hostfile, backend, pythons)
    try:
        return run.run(payloads, step_s)
    except _FailureError as failure:
        return failure.result
    finally:
        run.close()


LOST_PEER = "connection to a peer was lost"
"""What MLX's ring says when another rank has ended."""

NO_START = "did not start"
STARTING = "starting"
"""The step of a rank that has made none yet."""


class _FailureError(Exception):
    def __init__(self, host: str, message: str, remedy: str, is_stalled: bool = False):
        super().__init__(message)
        self.result = SelfTest((Finding(host, "self-test", "trouble", message, remedy),), is_stalled=is_stalled)


class _Run:
    def __init__(self, hostfile: Hostfile, backend: Backend, pythons: Mapping[str, str]):
        self._hostfile = hostfile
        self._backend: Backend = backend
        self._pythons = pythons
        self._inbox: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self._ranks: list[RankProcess] = []
        self._steps: dict[int, str] = {}

    def run(self, payloads: Sequence[Payload], step_s: float) -> SelfTest:
        hosts = self._hostfile.hosts
        for rank in range(len(hosts)):
            self._start(rank, payloads)
        listening = self._collect("listening", START_LIMIT_S, NO_START)
        self._join([port for rank in range(len(hosts)) for port in listening[rank]["ports"]])
        joined = self._collect("joined", JOIN_LIMIT_S, "did not join")
        done = self._collect("done", STEP_LIMIT_S + step_s, "came no further", is_stall=True)
        timings = tuple(_slowest(payload, number, done) for number, payload in enumerate(payloads))
        findings = tuple(chain.from_iterable(self._wrong(rank, done[rank]["wrong"]) for rank in sorted(done)))
        return SelfTest(findings or (self._right(timings),), timings, str(joined[0]["device"]))

    def close(self) -> None:
        end_all(self._ranks, END_PATIENCE_S)

    def _start(self, rank: int, payloads: Sequence[Payload]) -> None:
        host = self._hostfile.hosts[rank]
        command = guard_command(MODULE, self._pythons[host.ssh], WHOLE_LIMIT_S)
        preamble = b""
        if not is_local(host.ssh):
            preamble = f"exec {' '.join(map(quote_word, command))}".encode()
            command = ssh_command(host.ssh, script_command(preamble))
        process = RankProcess(rank, command, without_ring(os.environ), self._deliver, preamble)
        self._ranks.append(process)
        same = [number for number, each in enumerate(self._hostfile.hosts) if each.ssh == host.ssh]
        addresses = host.ips if self._backend == "ring" else host.ips[:1] if rank == 0 else ()
        process.send(
            "start",
            rank=rank,
            size=len(self._hostfile.hosts),
            place=[same.index(rank), len(same)],
            addresses=addresses,
            environment=dict(each.split("=", 1) for each in self._hostfile.envs),
            payloads=[payload.to_dict() for payload in payloads],
        )

    def _join(self, ports: Sequence[int]) -> None:
        """Tell all ranks where they find each other; a rank alone needs nobody."""
        is_ring, is_alone = self._backend == "ring", len(self._ranks) == 1
        text = "" if is_alone else backend_file(self._hostfile, self._backend, ports)
        place = "" if is_alone or is_ring else coordinator(self._hostfile, ports[0])
        for process in self._ranks:
            process.send("join", file=text, backend=self._backend, coordinator=place)

    def _collect(self, kind: str, limit_s: float, how: str, is_stall: bool = False) -> dict[int, Message]:
        """One message of this kind from each rank.

        Args:
            kind: of the message.
            limit_s: to wait for all of them; for the next news, if `is_stall`.
            how: what is said of a rank that sends none.
            is_stall: every step by anybody starts the time anew, and a rank may end when it has sent its message.
        """
        found: dict[int, Message] = {}
        done: dict[int, int] = {}
        end = time.monotonic() + limit_s
        while len(found) < len(self._ranks):
            try:
                rank, message = self._inbox.get(timeout=max(end - time.monotonic(), 0))
            except queue.Empty:
                raise self._late(sorted(set(range(len(self._ranks))) - found.keys()), how, limit_s) from None
            if message is None:
                if rank in found and is_stall:
                    continue
                raise self._ended(rank)
            if message["kind"] == "refused":
                raise self._refused(rank, str(message["error"]))
            if message["kind"] == "at":
                self._steps[rank] = str(message["step"])
            is_news = message["kind"] == kind or message.get("done") != done.get(rank)
            done[rank] = message.get("done", 0)
            if message["kind"] == kind:
                found[rank] = message
            if is_stall and is_news:
                end = time.monotonic() + limit_s
        return found

    def _late(self, ranks: Sequence[int], how: str, limit_s: float) -> _FailureError:
        """Ranks that have not said what they should, and what they were doing."""
        hosts = ", ".join(dict.fromkeys(self._hostfile.hosts[rank].ssh for rank in ranks))
        step = self._steps.get(ranks[0], STARTING)
        where = "" if step == STARTING else f", at the {step}"
        words = self._words()
        message = f"{', '.join(map(self._name, ranks))} {how} within {limit_s:.0f} s{where}{_indented(words)}"
        is_stalled = how != NO_START
        usual = "check the cable and the firewall" if is_stalled else "see whether that host or its disk is very busy"
        remedy = explain_jaccl(words) or f"{usual}, then run the doctor again"
        return _FailureError(hosts, message, remedy, is_stalled)

    def _ended(self, rank: int) -> _FailureError:
        """Why a rank ended: the first to go may not be the cause."""
        time.sleep(CAUSE_WAIT_S)
        while not self._inbox.empty():
            other, message = self._inbox.get()
            if message is not None and message["kind"] == "refused":
                return self._refused(other, str(message["error"]))
        ended = [process.rank for process in self._ranks if process.has_ended(0)]
        # one that only lost its peer is not the cause
        causes = [each for each in ended if LOST_PEER not in self._ranks[each].words]
        cause = next(iter(causes or ended), rank)
        message = f"{self._name(cause)} {self._ranks[cause].how_it_ended()}"
        remedy = explain_jaccl(self._words()) or "run the doctor again; if it stays, read the lines above"
        return _FailureError(self._hostfile.hosts[cause].ssh, message, remedy)

    def _refused(self, rank: int, error: str) -> _FailureError:
        host = self._hostfile.hosts[rank]
        remedy = f"give an address of its own; see them with `ssh {shlex.quote(host.ssh)} ifconfig`"
        return _FailureError(host.ssh, f"{self._name(rank)} {error}", remedy)

    def _wrong(self, rank: int, wrong: Sequence[Mapping[str, Any]]) -> list[Finding]:
        if not wrong:
            return []
        hosts = self._hostfile.hosts
        before = f"from {self._name((rank - 1) % len(hosts))}" if self._backend == "ring" else "from its peers"
        sources = sorted({source for each in wrong for source in each["sources"]})
        of = f"; parts of {', '.join(map(self._name, sources))}" if sources else ""
        first = wrong[0]
        message = (
            f"{self._name(rank)} got wrong results of {len(wrong)} payloads; first, the {first['payload']}: "
            f"{first['count']} of {first['of']} values; its data come {before}{of}"
        )
        remedy = "the link or MLX corrupts data: try another cable or port, `--backend ring`, the newest MLX on all"
        return [Finding(hosts[rank].ssh, "self-test", "trouble", message, remedy)]

    def _right(self, timings: Sequence[Timing]) -> Finding:
        hosts = ", ".join(dict.fromkeys(host.ssh for host in self._hostfile.hosts))
        count = sum(each.count for each in timings)
        if len(self._hostfile.hosts) == 1:
            return Finding(hosts, "self-test", "ok", "MLX starts and computes")
        over = f"{len(self._hostfile.hosts)} ranks over {self._backend}"
        message = f"{over}: {len(timings)} payloads right, {count} timed"
        return Finding(hosts, "self-test", "ok", message)

    def _name(self, rank: int) -> str:
        host = f"`{self._hostfile.hosts[rank].ssh}`"
        return host if len({each.ssh for each in self._hostfile.hosts}) > 1 else f"rank {rank} on {host}"

    def _words(self) -> str:
        return "\n".join(process.words for process in self._ranks if process.words)

    def _deliver(self, rank: int, message: Message | None) -> None:
        self._inbox.put((rank, message))


def _slowest(payload: Payload, number: int, done: Mapping[int, Message]) -> Timing:
    timings = [message["timings"][number] for message in done.values()]
    median_s, p99_s = (max(float(each[name]) for each in timings) for name in ("median_s", "p99_s"))
    return Timing(payload, median_s, p99_s, int(timings[0]["count"]))


def _indented(words: str) -> str:
    return "".join(f"\n  {line}" for line in words.splitlines())

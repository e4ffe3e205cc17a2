"""Start, connect, watch and end the ranks of a cluster."""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from kimi_mlx.cluster.channel.host_process import HostProcess
from kimi_mlx.cluster.channel.messages import Message, decode_error, encode
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.hosts.launch import FAST_SYNC, without_ring_variables
from kimi_mlx.cluster.hosts.ssh import SSH_FAILED, ScriptResult, command_on, is_local
from kimi_mlx.cluster.hosts.ssh_errors import explain_ssh
from kimi_mlx.cluster.ring.backends import backend_file, coordinator
from kimi_mlx.cluster.ring.ending import Inbox, RankEnd, end_ranks
from kimi_mlx.cluster.ring.guard import guard_command
from kimi_mlx.cluster.ring.jaccl_errors import explain_jaccl
from kimi_mlx.cluster.ring.link_diagnosis import find_corrupt_links
from kimi_mlx.cluster.ring.rank_log import open_logs
from kimi_mlx.cluster.ring.watch import JOIN_S, START_S, TEST_S, RankActivity, RingTimeouts, RingWatch
from kimi_mlx.errors import KimiMlxError, RingError, StallError

RANK_MODULE = "kimi_mlx.rank.main"
"""Default module of a rank."""

FRONT_SILENCE_S = 15.0
"""Ranks on other hosts end if they receive nothing from the front for this long."""

CAUSE_WAIT_S = 0.5
"""Wait after a rank has ended, in case another one ended before it and is the cause."""

POLL_INTERVAL_S = 0.25

LOST_PEER = "connection to a peer was lost"
"""Message of MLX's ring when another rank has ended."""

PORT_TAKEN = "Couldn't bind socket"
"""Message of MLX's ring when another process took the port after it was chosen."""

HINT = "start the command again; `kimi-mlx doctor` looks for the cause"


class Ring:
    """The ranks of a cluster. Each is a process that exchanges JSON lines with this one, through pipes or ssh.

    Use it as a context manager: leaving it ends every rank.

    Args:
        cluster: hosts of the ranks.
        limits: timeouts.
        module: module whose `main` a rank runs.
        is_over: set to stop waiting.
    """

    def __init__(
        self,
        cluster: Cluster,
        limits: RingTimeouts | None = None,
        module: str = RANK_MODULE,
        is_over: threading.Event | None = None,
    ):
        self.cluster = cluster
        self.world_size = cluster.size
        self._limits = limits or RingTimeouts()
        self._module = module
        self._is_over = is_over or threading.Event()
        self._inbox: Inbox = queue.SimpleQueue()
        self._ends: dict[int, RankEnd] = {}
        self._is_lost = False
        self._early: deque[tuple[int, Message]] = deque()  # messages of fast ranks while slow ones still join
        self._ranks: list[HostProcess] = []
        self._pids: list[int | None] = []
        self._logs = open_logs(cluster.size)
        self._tag = ""
        self._watch = RingWatch(cluster.size, self._limits, time.monotonic())

    def start(self, **settings: object) -> None:
        """Start the ranks and wait until all are connected; each gets `settings` in its `start` message.

        Raises:
            RingError: a rank cannot be started, cannot connect to the others, or receives corrupt data.
            SshError: a host cannot be reached.
        """
        try:
            self._start(settings)
        except RingError as error:
            if PORT_TAKEN not in error.message:
                raise
            self._start(settings)  # with other ports

    def _start(self, settings: dict[str, object]) -> None:
        self._tag = secrets.token_hex(8)
        self._is_lost = False
        self._inbox = queue.SimpleQueue()  # drops messages of an earlier start
        self._early.clear()
        self._ends = {rank: RankEnd() for rank in range(self.world_size)}
        self._pids = [None] * self.world_size
        try:
            for rank in range(self.world_size):
                self._start_rank(rank, settings)
            listening = self._collect("listening", START_S, "did not start")
            self._pids = [listening[rank]["pid"] for rank in range(self.world_size)]
            self._join(listening)
            self._collect(
                "joined", JOIN_S, f"could not connect to the other ranks{self._other_addresses()}", StallError
            )
            tested = self._collect("tested", TEST_S, "did not finish the link test", StallError)
            self._check_links({rank: message["mismatches"] for rank, message in tested.items()})
        except BaseException:
            self.close()
            raise
        self._watch = RingWatch(self.world_size, self._limits, time.monotonic())

    def allow_slow_steps(self) -> None:
        """Use the timeouts of ranks that read experts from their SSDs, until the next start."""
        self._watch.set_limits(self._limits.of_streaming)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, on their hosts."""
        return [pid for pid in self._pids if pid is not None]

    @property
    def activity(self) -> tuple[RankActivity, ...]:
        """Activity of each rank. Safe from any thread."""
        return self._watch.activity(time.monotonic())

    def send(self, kind: str, **fields: object) -> None:
        """Send a message to every rank."""
        self.write(encode(kind, **fields))

    def write(self, line: bytes) -> None:
        """Send an encoded message to every rank."""
        for process in self._ranks:
            process.write(line)

    def write_to(self, rank: int, line: bytes) -> None:
        """Send an encoded message to one rank; do nothing after `close`."""
        for process in self._ranks[rank : rank + 1]:
            process.write(line)

    def num_unsent(self, rank: int) -> int:
        """Return the number of messages to a rank that are queued; 0 after `close`."""
        return sum(process.num_unsent for process in self._ranks[rank : rank + 1])

    def messages(self) -> Iterator[tuple[int, Message]]:
        """Yield (rank, message) as they arrive, without heartbeats, until `is_over` is set.

        Raises:
            RingError: a rank has ended or does not respond, a link is dead, or there is no progress; close the ring.
            KimiMlxError: a rank reports an error.
        """
        while self._ranks:
            if self._is_over.is_set():
                return
            while self._early:
                yield self._early.popleft()
            try:
                rank, message = self._inbox.get(timeout=POLL_INTERVAL_S)
            except queue.Empty:
                self._raise_if_lost()
                continue
            if self._handle_end_message(rank, message):
                continue
            assert message is not None
            self._watch.on_message(rank, message, time.monotonic())
            if message["kind"] == "alive":
                self._raise_if_lost()
            else:
                yield rank, message
        raise RingError("the connection between the ranks was lost", hint=HINT)

    def close(self) -> None:
        """End all ranks on all hosts, and wait until they have released their memory. It may be called again."""
        if self._is_lost:
            self.send("lost")
        ranks, self._ranks = self._ranks, []
        if ranks:
            names = {process.rank: self._name(process.rank) for process in ranks}
            hosts = {process.rank: self._host(process.rank) for process in ranks}
            envs = self.cluster.hostfile.envs
            self.unconfirmed_hosts = end_ranks(ranks, self._ends, self._inbox, names, hosts, self._tag, envs)

    unconfirmed_hosts: Sequence[str] = ()
    """Hosts that did not confirm that all ranks have ended. Ranks end there by themselves after FRONT_SILENCE_S."""

    def __enter__(self) -> Ring:
        """Return the ring, not started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all ranks."""
        self.close()

    def _host(self, rank: int) -> str:
        return self.cluster.hostfile.hosts[rank].ssh

    def _start_rank(self, rank: int, settings: dict[str, object]) -> None:
        host = self._host(rank)
        silence_s = None if is_local(host) else FRONT_SILENCE_S
        guard = guard_command(self._module, self.cluster.pythons[host], self._tag, silence_s)
        start = command_on(host, _with_envs(self.cluster.hostfile.envs, guard))
        try:
            process = HostProcess(
                rank,
                start.command,
                without_ring_variables(os.environ),
                self._message_callback(),
                start.data,
                start.mark,
                sends_heartbeats=True,
                log=self._logs[rank],
            )
        except OSError as error:
            raise RingError(f"rank {rank} cannot be started: {error}", rank=rank) from error
        self._ranks.append(process)
        process.send(
            "start",
            rank=rank,
            size=self.world_size,
            cpu_slot=self.cluster.cpu_slot(rank),
            addresses=self.cluster.addresses(rank),
            **settings,
        )

    def _message_callback(self) -> Callable[[int, Message | None], None]:
        inbox = self._inbox
        return lambda rank, message: inbox.put((rank, message))

    def _join(self, listening: dict[int, Message]) -> None:
        """Send all ranks the addresses of the others."""
        cluster = self.cluster
        ports = [port for rank in range(cluster.size) for port in listening[rank]["ports"]]
        is_alone, is_ring = cluster.size == 1, cluster.backend == "ring"
        file = "" if is_alone else backend_file(cluster.hostfile, cluster.backend, ports)
        files = [file] * cluster.size if cluster.hostfile_rewriter is None else cluster.hostfile_rewriter(file)
        fields = {
            "backend": cluster.backend,
            "coordinator": "" if is_alone or is_ring else coordinator(cluster.hostfile, ports[0]),
            "ring_token": secrets.token_hex(8),
            "links": [self._link(rank, listening[rank]["link_port"]) for rank in range(cluster.size)],
        }
        for process in self._ranks:
            process.send("join", file=files[process.rank], **fields)

    def _link(self, rank: int, port: int | None) -> tuple[str, int] | None:
        return None if port is None else (self.cluster.hostfile.hosts[rank].ips[0], port)

    def _collect(
        self, kind: str, limit_s: float, failure: str, timeout_error: type[RingError] = RingError
    ) -> dict[int, Message]:
        """Return one message of a kind from each rank, during the start.

        Args:
            kind: kind of the message.
            limit_s: timeout for all of them.
            failure: what to report of a rank that sends none.
            timeout_error: class of that error.
        """
        received = {rank: message for rank, message in self._early if message["kind"] == kind}
        self._early = deque(item for item in self._early if item[1]["kind"] != kind)
        end = time.monotonic() + limit_s
        while len(received) < self.world_size:
            if self._is_over.is_set():
                raise RingError("the connection between the ranks was lost", hint=HINT)
            try:
                rank, message = self._inbox.get(timeout=POLL_INTERVAL_S)
            except queue.Empty:
                if time.monotonic() < end:
                    continue
                missing = next(rank for rank in range(self.world_size) if rank not in received)
                error = f"{failure} within {limit_s:.0f} s{self._last_output(missing)}"
                raise self._lost(missing, error, timeout_error) from None
            if self._handle_end_message(rank, message):
                continue
            assert message is not None
            if message["kind"] == kind:
                received[rank] = message
            elif message["kind"] != "alive":
                self._early.append((rank, message))
        return received

    def _check_links(self, mismatches: dict[int, list[Message]]) -> None:
        """Raise RingError if the link test of a rank failed."""
        if links := find_corrupt_links(self.cluster, mismatches):
            raise RingError(links[0].message, hint=links[0].hint, rank=links[0].rank)

    def _raise_if_lost(self) -> None:
        problem = self._watch.check(time.monotonic())
        if problem is None:
            return
        self._is_lost = True
        kind = StallError if problem.is_stall else RingError
        if problem.rank is None:
            raise kind(f"the ring of {self.world_size} ranks: {problem.message}", hint=HINT)
        raise self._lost(problem.rank, problem.message, kind)

    def _handle_end_message(self, rank: int, message: Message | None) -> bool:
        """Record the information of a message about the end of its rank; return whether the message has no other.

        Raises:
            KimiMlxError: the rank has ended, or is ending.
        """
        if message is None or message["kind"] in ("error", "failed"):
            raise self._end_error(rank, message)
        self._ends[rank].on_message(message, time.monotonic())
        return message["kind"] in ("end_limit", "unloading", "unloaded")

    def _end_error(self, rank: int, message: Message | None) -> KimiMlxError:
        """Return the error of a ring that ended.

        A rank that loses a peer ends too, so the first one to end may not be the cause.

        Args:
            rank: rank that has ended.
            message: its `error` or `failed`; None if it has closed its output.
        """
        self._is_lost = True
        time.sleep(CAUSE_WAIT_S)
        last = {rank: message} if message is not None else {}
        while not self._inbox.empty():
            other, message = self._inbox.get()
            if message is not None and message["kind"] in ("error", "failed"):
                last.setdefault(other, message)
            elif message is not None:
                self._ends[other].on_message(message, time.monotonic())
        reported = [decode_error(message) for message in last.values() if message["kind"] == "error"]
        own_errors = [error for error in reported if not isinstance(error, RingError)]
        ended = [process for process in self._ranks if process.exit_code is not None]
        killed = [process.rank for process in ended if process.signal_number is not None]
        if own_errors or (reported and not killed):
            return (own_errors or reported)[0]
        ending = [*(process.rank for process in ended), *last]
        causes = [number for number in ending if LOST_PEER not in self._ranks[number].output]
        cause = next(iter(killed or causes), rank)
        process = self._ranks[cause]
        if process.exit_code == SSH_FAILED and not is_local(self._host(cause)):
            if self._pids[cause] is not None and not process.output:
                return self._lost(cause, "was killed, or its ssh session was")
            return explain_ssh(ScriptResult(self._host(cause), SSH_FAILED, "", process.output, 0))
        if process.exit_code is not None and not process.has_started:
            return explain_ssh(
                ScriptResult(self._host(cause), process.exit_code, "", process.output, 0, has_started=False)
            )
        if cause in last and cause not in killed:
            return self._lost(cause, last[cause]["text"] + self._last_output(cause))
        return self._lost(cause, process.describe_exit())

    def _lost(self, rank: int, description: str, kind: type[RingError] = RingError) -> RingError:
        outputs = "\n".join(process.output for process in self._ranks if process.output)
        path = self._logs[rank]
        log = f"; its log is {path}" if path is not None and path.exists() else ""
        return kind(f"{self._name(rank)} {description}", hint=(explain_jaccl(outputs) or HINT) + log, rank=rank)

    def _name(self, rank: int) -> str:
        host = self._host(rank)
        where = "" if is_local(host) else f"`{host}`, "
        where += f"process {pid}" if (pid := self._pids[rank]) is not None else "not yet started"
        return f"rank {rank} of {self.world_size} ({where})"

    def _other_addresses(self) -> str:
        """Return the addresses at which ranks connect to each other, for a message."""
        addresses = dict.fromkeys(address for host in self.cluster.hostfile.hosts for address in host.ips[:1])
        return f" at {', '.join(addresses)}"

    def _last_output(self, rank: int) -> str:
        output = self._ranks[rank].output
        return "".join(f"\n  {line}" for line in output.splitlines())


def _with_envs(envs: Sequence[str], command: list[str]) -> list[str]:
    """Return a command that runs with environment variables; its path may contain a `=`.

    The fast fence is off unless `envs` turns it on, whatever the host's own environment says.
    """
    return ["env", f"{FAST_SYNC}=0", *envs, "sh", "-c", 'exec "$@"', "sh", *command]

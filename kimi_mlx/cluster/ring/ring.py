"""Ranks on one or several hosts: start, connect, watch, end."""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from kimi_mlx.cluster.channel.host_process import HostProcess, terminate_all
from kimi_mlx.cluster.channel.messages import Message, decode_error, encode
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.hosts.launch import FAST_SYNC, without_ring_variables
from kimi_mlx.cluster.hosts.ssh import SSH_FAILED, ScriptResult, command_on, is_local
from kimi_mlx.cluster.hosts.ssh_errors import explain_ssh
from kimi_mlx.cluster.ring.backends import backend_file, coordinator
from kimi_mlx.cluster.ring.cleanup import sweep
from kimi_mlx.cluster.ring.guard import guard_command
from kimi_mlx.cluster.ring.jaccl_errors import explain_jaccl
from kimi_mlx.cluster.ring.link_diagnosis import find_corrupt_links
from kimi_mlx.cluster.ring.rank_log import open_logs
from kimi_mlx.cluster.ring.watch import JOIN_S, START_S, TEST_S, RingTimeouts, RingWatch
from kimi_mlx.errors import KimiMlxError, RingError, StallError

RANK_MODULE = "kimi_mlx.rank.main"
"""What a rank runs, if it is not told otherwise."""

FRONT_SILENCE_S = 15.0
"""After which ranks on other hosts take it that the front is gone, and end."""

CAUSE_WAIT_S = 0.5
"""How long to wait, when a rank has ended, for word of another that ended before."""

POLL_INTERVAL_S = 0.25

END_PATIENCE_S = 2.0
"""How long a rank may take to end by itself, and again after SIGTERM."""

LOST_PEER = "connection to a peer was lost"
"""What MLX's ring says when another rank has ended."""

PORT_TAKEN = "Couldn't bind socket"
"""What it says when another process has taken the port in the moment since it was chosen."""

HINT = "start the command again; `kimi-mlx doctor` looks for the cause"


class Ring:
    """The ranks of a cluster, each a process with a channel to this one: JSON lines through pipes, or through ssh.

    A context manager: leaving it ends every rank.

    Args:
        cluster: where they run.
        limits: how long things may take.
        module: what a rank runs.
        is_over: set by another thread when nobody wants to hear more.
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
        self._inbox: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self._early: deque[tuple[int, Message]] = deque()  # what fast ranks say while slow ones still join
        self._ranks: list[HostProcess] = []
        self._pids: list[int | None] = []
        self._logs = open_logs(cluster.size)
        self._tag = ""
        self._watch = RingWatch(cluster.size, self._limits, time.monotonic())

    def start(self, **settings: object) -> None:
        """Start the ranks and wait until all are connected; each gets `settings` in its `start` message.

        Raises:
            RingError: a rank that cannot be started, that does not find the others, or gets other data than were sent.
            SshError: a host that cannot be reached.
        """
        try:
            self._start(settings)
        except RingError as error:
            if PORT_TAKEN not in error.message:
                raise
            self._start(settings)  # with other ports

    def _start(self, settings: dict[str, object]) -> None:
        self._tag = secrets.token_hex(8)
        self._inbox = queue.SimpleQueue()  # what an earlier start may still say is not heard
        self._early.clear()
        self._pids = [None] * self.world_size
        try:
            for rank in range(self.world_size):
                self._start_rank(rank, settings)
            listening = self._collect("listening", START_S, "did not start")
            self._pids = [listening[rank]["pid"] for rank in range(self.world_size)]
            self._join(listening)
            self._collect("joined", JOIN_S, f"did not find the others{self._others()}", StallError)
            tested = self._collect("tested", TEST_S, "did not get through the test of its links", StallError)
            self._require_right({rank: message["mismatches"] for rank, message in tested.items()})
        except BaseException:
            self.close()
            raise
        self._watch = RingWatch(self.world_size, self._limits, time.monotonic())

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, each on its host."""
        return [pid for pid in self._pids if pid is not None]

    def send(self, kind: str, **fields: object) -> None:
        """Send a message to every rank."""
        self.write(encode(kind, **fields))

    def write(self, line: bytes) -> None:
        """Send an encoded message to every rank."""
        for process in self._ranks:
            process.write(line)

    def messages(self) -> Iterator[tuple[int, Message]]:
        """Yield (rank, message) as they come, heartbeats left out, until all is over.

        Raises:
            RingError: a rank has ended or fallen silent, a link is dead, or nothing goes on; the ring is to be closed.
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
                self._look()
                continue
            if message is None:
                raise self._ended(rank)
            self._watch.on_message(rank, message, time.monotonic())
            if message["kind"] == "error":
                raise self._ended(rank, decode_error(message))
            if message["kind"] == "alive":
                self._look()
            else:
                yield rank, message
        raise RingError("the ring has ended", hint=HINT)

    def close(self) -> None:
        """End all ranks, on every host, and look that nothing is left; may be called again."""
        ranks, self._ranks = self._ranks, []
        terminate_all(ranks, END_PATIENCE_S)
        doubtful = {self._host(process.rank) for process in ranks if not process.has_confirmed_exit}
        if ranks:
            self.unreachable_hosts = sweep(sorted(doubtful), self._tag, self.cluster.hostfile.envs) if doubtful else []

    unreachable_hosts: Sequence[str] = ()
    """Hosts that could not be asked whether all ranks have ended; they end there by themselves (FRONT_SILENCE_S)."""

    def __enter__(self) -> Ring:
        """Nothing yet: see start."""
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
        command, preamble = command_on(host, _with_envs(self.cluster.hostfile.envs, guard))
        try:
            process = HostProcess(
                rank,
                command,
                without_ring_variables(os.environ),
                self._delivery(),
                preamble,
                beats=True,
                log=self._logs[rank],
            )
        except OSError as error:
            raise RingError(f"rank {rank} cannot be started: {error}", rank=rank) from error
        self._ranks.append(process)
        process.send(
            "start",
            rank=rank,
            size=self.world_size,
            place=self.cluster.place(rank),
            addresses=self.cluster.addresses(rank),
            **settings,
        )

    def _delivery(self) -> Callable[[int, Message | None], None]:
        inbox = self._inbox
        return lambda rank, message: inbox.put((rank, message))

    def _join(self, listening: dict[int, Message]) -> None:
        """Tell all ranks where they find each other."""
        cluster = self.cluster
        ports = [port for rank in range(cluster.size) for port in listening[rank]["ports"]]
        is_alone, is_ring = cluster.size == 1, cluster.backend == "ring"
        file = "" if is_alone else backend_file(cluster.hostfile, cluster.backend, ports)
        files = [file] * cluster.size if cluster.hostfile_rewriter is None else cluster.hostfile_rewriter(file)
        told = {
            "backend": cluster.backend,
            "coordinator": "" if is_alone or is_ring else coordinator(cluster.hostfile, ports[0]),
            "word": secrets.token_hex(8),
            "links": [self._link(rank, listening[rank]["link_port"]) for rank in range(cluster.size)],
        }
        for process in self._ranks:
            process.send("join", file=files[process.rank], **told)

    def _link(self, rank: int, port: int | None) -> tuple[str, int] | None:
        return None if port is None else (self.cluster.hostfile.hosts[rank].ips[0], port)

    def _collect(self, kind: str, limit_s: float, how: str, late: type[RingError] = RingError) -> dict[int, Message]:
        """One message of this kind from each rank, while the ring does not stand yet.

        Args:
            kind: of the message.
            limit_s: to wait for all of them.
            how: what is said of a rank that sends none.
            late: the error for that.
        """
        found = {rank: message for rank, message in self._early if message["kind"] == kind}
        self._early = deque(each for each in self._early if each[1]["kind"] != kind)
        end = time.monotonic() + limit_s
        while len(found) < self.world_size:
            if self._is_over.is_set():
                raise RingError("the ring has ended", hint=HINT)
            try:
                rank, message = self._inbox.get(timeout=POLL_INTERVAL_S)
            except queue.Empty:
                if time.monotonic() < end:
                    continue
                missing = next(rank for rank in range(self.world_size) if rank not in found)
                raise self._lost(missing, f"{how} within {limit_s:.0f} s{self._last_words(missing)}", late) from None
            if message is None:
                raise self._ended(rank)
            if message["kind"] == "error":
                raise self._ended(rank, decode_error(message))
            if message["kind"] == kind:
                found[rank] = message
            elif message["kind"] != "alive":
                self._early.append((rank, message))
        return found

    def _require_right(self, wrong: dict[int, list[Message]]) -> None:
        """What all ranks say of the test of their links."""
        if found := find_corrupt_links(self.cluster, wrong):
            raise RingError(found[0].message, hint=found[0].hint, rank=found[0].rank)

    def _look(self) -> None:
        trouble = self._watch.check(time.monotonic())
        if trouble is None:
            return
        kind = StallError if trouble.is_stall else RingError
        if trouble.rank is None:
            raise kind(f"the ring of {self.world_size} ranks: {trouble.what}", hint=HINT)
        raise self._lost(trouble.rank, trouble.what, kind)

    def _ended(self, rank: int, told: KimiMlxError | None = None) -> KimiMlxError:
        """Why the ring ended: a rank that loses a peer ends, too, so the first to go may not be the cause.

        Args:
            rank: that has ended.
            told: its last word.
        """
        time.sleep(CAUSE_WAIT_S)
        said = [] if told is None else [told]
        while not self._inbox.empty():
            _, message = self._inbox.get()
            if message is not None and message["kind"] == "error":
                said.append(decode_error(message))
        own = [error for error in said if not isinstance(error, RingError)]
        ended = [process for process in self._ranks if process.wait(0)]
        killed = [process.rank for process in ended if process.signal_number is not None]
        if own or (said and not killed):
            return (own or said)[0]
        causes = [process.rank for process in ended if LOST_PEER not in process.words]
        cause = next(iter(killed or causes), rank)
        process = self._ranks[cause]
        if process.exit_code == SSH_FAILED and not is_local(self._host(cause)):
            if self._pids[cause] is not None and not process.words:
                return self._lost(cause, "was killed, or its ssh session was")
            return explain_ssh(ScriptResult(self._host(cause), SSH_FAILED, "", process.words, 0))
        return self._lost(cause, process.describe_exit())

    def _lost(self, rank: int, how: str, kind: type[RingError] = RingError) -> RingError:
        host = self._host(rank)
        where = "" if is_local(host) else f"`{host}`, "
        where += f"process {pid}" if (pid := self._pids[rank]) is not None else "not yet started"
        words = "\n".join(process.words for process in self._ranks if process.words)
        path = self._logs[rank]
        log = f"; its log is {path}" if path is not None and path.exists() else ""
        return kind(
            f"rank {rank} of {self.world_size} ({where}) {how}",
            hint=(explain_jaccl(words) or HINT) + log,
            rank=rank,
        )

    def _others(self) -> str:
        """Where ranks look for each other."""
        places = dict.fromkeys(address for host in self.cluster.hostfile.hosts for address in host.ips[:1])
        return f" at {', '.join(places)}"

    def _last_words(self, rank: int) -> str:
        words = self._ranks[rank].words
        return "".join(f"\n  {line}" for line in words.splitlines())


def _with_envs(envs: Sequence[str], command: list[str]) -> list[str]:
    """A command with variables, which libraries may read when they are imported; its path may hold a `=`.

    The fast fence is off unless they turn it on, whatever the host's own environment says.
    """
    return ["env", f"{FAST_SYNC}=0", *envs, "sh", "-c", 'exec "$@"', "sh", *command]

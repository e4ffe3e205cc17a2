"""End the ranks of a ring, and wait until they have released their memory. Only a rank that is stuck is killed."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kimi_mlx.cluster.channel.host_process import HostProcess
from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.ring.cleanup import end_leftovers
from kimi_mlx.cluster.ring.end_limits import KILL_S, SHOW_AFTER_S, unload_limit_s
from kimi_mlx.cluster.ring.guard import EXIT_KILLED
from kimi_mlx.units import format_bytes

LOG = logging.getLogger(__name__)

ANSWER_S = 3.0
"""A rank that sends nothing for this long, not even a heartbeat, is ended over a new connection to its host."""

GUARD_S = 3.0
"""Time for a guard to report the end of its rank."""

POLL_INTERVAL_S = 0.02

Inbox = queue.SimpleQueue[tuple[int, Message | None]]
"""Messages of the ranks; None when a rank closes its output."""


@dataclass
class RankEnd:
    """Progress of the end of one rank. Pure: the caller passes the time.

    Args:
        limit_s: time that the rank may need to end, as it reported; 0 before it is connected to the others.
        held_bytes: memory that it holds, as it last reported.
        is_unloading: whether it has begun to release its memory.
        is_unloaded: whether it has released its memory.
    """

    limit_s: float = 0.0
    held_bytes: int = 0
    is_unloading: bool = False
    is_unloaded: bool = False
    _started_at: float = 0.0
    _last_message_at: float = 0.0

    @property
    def total_limit_s(self) -> float:
        """Time for the end of a rank that cannot send messages any more."""
        return self.limit_s + (0.0 if self.is_unloading else unload_limit_s(self.held_bytes))

    def begin(self, now: float) -> None:
        """Start the clock: the input of the rank is closed."""
        self._started_at = self._last_message_at = now

    def on_message(self, message: Message, now: float) -> None:
        """Record a message of the rank."""
        self._last_message_at = now
        if message["kind"] == "end_limit":
            self.limit_s, self._started_at = message["seconds"], now
        elif message["kind"] == "alive":
            self.held_bytes = message.get("memory", 0)
        elif message["kind"] == "unloading":
            self.is_unloading, self.held_bytes = True, message["bytes"]
        elif message["kind"] == "unloaded":
            self.is_unloaded, self.held_bytes = True, message["bytes"]

    def is_overdue(self, now: float) -> bool:
        """Return whether to stop waiting for the rank."""
        # While it releases memory, Python's lock may keep it from sending heartbeats.
        is_silent = not self.is_unloading and now > self._last_message_at + ANSWER_S
        return is_silent or now > self._started_at + self.limit_s + KILL_S + GUARD_S


def end_ranks(
    ranks: Sequence[HostProcess],
    ends: Mapping[int, RankEnd],
    inbox: Inbox,
    names: Mapping[int, str],
    hosts: Mapping[int, str],
    tag: str,
    envs: Sequence[str],
) -> list[str]:
    """End ranks: close their inputs, wait, and end what is left on their hosts.

    Args:
        ranks: processes of the ranks.
        ends: rank -> progress of its end.
        inbox: messages of the ranks.
        names: rank -> name for messages.
        hosts: rank -> host.
        tag: tag of the processes.
        envs: `NAME=value` that the ranks were started with.

    Returns:
        Hosts that did not confirm that all ranks have ended.
    """
    timer = threading.Timer(SHOW_AFTER_S, lambda: LOG.warning(_waiting_message(ranks, ends, names)))
    timer.daemon = True
    timer.start()
    try:
        _wait(ranks, ends, inbox)
        unconfirmed = [process for process in ranks if not process.has_confirmed_exit]
        limit_s = max((ends[process.rank].total_limit_s for process in unconfirmed), default=0.0)
        left = end_leftovers(sorted({hosts[process.rank] for process in unconfirmed}), tag, limit_s, envs)
        for process in ranks:
            if not process.wait(GUARD_S if process in unconfirmed else 0):
                process.signal(signal.SIGKILL)  # an ssh client, or a guard without a rank
            process.release(GUARD_S)
    finally:
        timer.cancel()
    killed = [names[process.rank] for process in ranks if process.exit_code == EXIT_KILLED]
    killed += [f"{count} process{'es' * (count > 1)} on `{host}`" for host, count in left.num_killed.items()]
    if killed:
        LOG.warning(
            f"killed: {', '.join(killed)}. On a Mac, the memory of the weights may stay in use until that Mac "
            "restarts; `kimi-mlx doctor` shows it (or `vm_stat`: pages wired down)"
        )
    return left.unconfirmed_hosts


def _wait(ranks: Sequence[HostProcess], ends: Mapping[int, RankEnd], inbox: Inbox) -> None:
    """Close the inputs, and wait for the ranks that answer; close the connections to the others."""
    for process in ranks:
        process.close_input()
        ends[process.rank].begin(time.monotonic())
    waiting = list(ranks)
    while waiting:
        _receive(inbox, ends)
        waiting = [process for process in waiting if not process.wait(0)]
        for process in [process for process in waiting if ends[process.rank].is_overdue(time.monotonic())]:
            process.signal(signal.SIGTERM)  # an ssh client, or a guard on this host, which ends its rank
            waiting.remove(process)


def _receive(inbox: Inbox, ends: Mapping[int, RankEnd]) -> None:
    try:
        rank, message = inbox.get(timeout=POLL_INTERVAL_S)
    except queue.Empty:
        return
    if message is not None:
        ends[rank].on_message(message, time.monotonic())


def _waiting_message(ranks: Sequence[HostProcess], ends: Mapping[int, RankEnd], names: Mapping[int, str]) -> str:
    running = [process.rank for process in ranks if process.exit_code is None]
    held_bytes = sum(ends[rank].held_bytes for rank in running)
    limit_s = max((ends[rank].total_limit_s for rank in running), default=0.0)
    rank_names = ", ".join(names[rank] for rank in running) or "the hosts"
    task = f"release {format_bytes(held_bytes)} of memory" if held_bytes else "end"
    return f"waiting for {rank_names} to {task} (up to {limit_s:.0f} s)"

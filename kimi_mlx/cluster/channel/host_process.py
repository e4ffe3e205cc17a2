"""One rank as the front sees it: a child process (here or of ssh), its messages, its last words."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kimi_mlx.cluster.channel.messages import HEARTBEAT_S, Message, decode, encode
from kimi_mlx.cluster.hosts.ssh import SSH_FAILED
from kimi_mlx.errors import KimiMlxError

LINE_LIMIT_BYTES = 1 << 28
"""Of a message; the longest has the files of a tokenizer."""

LOG_LIMIT_BYTES = 10 << 20
"""Of a rank's log."""

STDERR_TAIL_LINES = 12
"""Lines of a rank's standard error that are kept to be shown."""


class HostProcess:
    """A running rank.

    Args:
        rank: its number.
        command: what to run.
        environment: its variables.
        deliver: called from a thread with (rank, message) for each message, and (rank, None) when it has ended.
        preamble: what its input begins with, such as the script for the shell of a host. A login shell there may
            print a greeting: lines before the first message are then kept as its words.
        beats: whether it is told every second that we are there.
        log: a file that its standard error and its notes are added to.
    """

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        deliver: Callable[[int, Message | None], None],
        preamble: bytes = b"",
        *,
        beats: bool = False,
        log: Path | None = None,
    ):
        self.rank = rank
        self._beats = beats
        self._log, self._logged_bytes = log, 0
        self.last_heard = time.monotonic()
        self._deliver = deliver
        self._words: deque[str] = deque(maxlen=STDERR_TAIL_LINES)
        # A session of its own: Ctrl-C in the terminal reaches the front alone, which then ends the ranks in order.
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._is_greeting = bool(preamble)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._outbox.put(preamble)
        work = (self._listen, self._keep_words, self._write)
        self._threads = [threading.Thread(target=each, daemon=True) for each in work]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, kind: str, **fields: object) -> None:
        """Send a message; safe from a signal handler, since a thread writes it."""
        self.write(encode(kind, **fields))

    def write(self, line: bytes) -> None:
        """Send an encoded message."""
        self._outbox.put(line)

    def close_input(self) -> None:
        """Ask the rank to end: it does when its input ends."""
        self._outbox.put(None)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        self._process.send_signal(number)

    def wait(self, limit_s: float) -> bool:
        """Wait at most so long for the end."""
        try:
            self._process.wait(max(limit_s, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def release(self, limit_s: float) -> None:
        """Wait for the end, then close the pipes."""
        self.wait(limit_s)
        for thread, pipe in zip(self._threads, (self._process.stdout, self._process.stderr), strict=False):
            thread.join(limit_s)
            if pipe is not None and not thread.is_alive():  # whoever still holds the other end is swept away next
                pipe.close()

    @property
    def signal_number(self) -> int | None:
        """The signal that ended it, as its guard tells; None if none did."""
        code = self._process.poll() or 0
        number = -code if code < 0 else code - 128
        return number if number in set(signal.Signals) and code != SSH_FAILED else None

    @property
    def has_confirmed_exit(self) -> bool:
        """Whether its guard (here, or at the other end of ssh) has told its exit code: nothing is left of it then."""
        code = self._process.poll()
        return code is not None and 0 <= code != SSH_FAILED

    @property
    def exit_code(self) -> int | None:
        """Of the process; None while it runs."""
        return self._process.poll()

    @property
    def words(self) -> str:
        """Its last lines of standard error."""
        return "\n".join(self._words)

    @property
    def last_line(self) -> str:
        """The last one of standard error; empty if there is none."""
        return self._words[-1] if self._words else ""

    def describe_exit(self) -> str:
        """In words: the signal or the exit code, and its last lines."""
        if not self.wait(1):
            return "closed its output but runs on"
        self._threads[1].join(1)
        number = self.signal_number
        how = f"exited with code {self.exit_code}" if number is None else f"was ended by {signal.Signals(number).name}"
        words = "\n".join(f"  {line}" for line in self._words)
        return f"{how}; its last lines:\n{words}" if words else how

    def _listen(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in iter(lambda: stdout.readline(LINE_LIMIT_BYTES), b""):
            self.last_heard = time.monotonic()
            try:
                message = decode(line)
                self._is_greeting = False
                if message["kind"] == "note":
                    self._write_log(f"{message['text']}\n".encode())
                else:
                    self._deliver(self.rank, message)
            except KimiMlxError as error:
                if self._is_greeting:
                    self._words.append(line.decode(errors="replace").rstrip())
                    continue
                self._words.append(error.message)
                break
        self._deliver(self.rank, None)

    def _write(self) -> None:
        assert self._process.stdin is not None
        # A rank that is gone is noticed by the end of its output, not here.
        with contextlib.suppress(OSError), self._process.stdin as pipe:
            while (line := self._next_line()) is not None:
                pipe.write(line)
                pipe.flush()

    def _next_line(self) -> bytes | None:
        try:
            return self._outbox.get(timeout=HEARTBEAT_S if self._beats else None)
        except queue.Empty:
            return encode("alive")

    def _keep_words(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._words.append(line.decode(errors="replace").rstrip())
            self._write_log(line)

    def _write_log(self, line: bytes) -> None:
        self._logged_bytes += len(line)
        if self._log is not None and self._logged_bytes < LOG_LIMIT_BYTES:
            with contextlib.suppress(OSError), self._log.open("ab") as file:  # a full disk ends no rank
                file.write(line)


def terminate_all(processes: Sequence[HostProcess], patience_s: float) -> None:
    """End ranks and wait for them: by closing their input, then SIGTERM, then SIGKILL, each after `patience_s`."""
    for process in processes:
        process.close_input()
    for harder in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + patience_s
        left = [process for process in processes if not process.wait(end - time.monotonic())]
        for process in left:
            process.signal(harder)
    for process in processes:
        process.release(patience_s)

"""The front's side of one rank: a child process (local, or the ssh client), its messages and its last output."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kimi_mlx.cluster.channel.messages import HEARTBEAT_S, Message, decode, encode
from kimi_mlx.cluster.hosts.marked_script import PREFIX_VARIABLE, message_prefix
from kimi_mlx.cluster.hosts.ssh import SSH_FAILED
from kimi_mlx.errors import KimiMlxError

LOG = logging.getLogger(__name__)

LINE_LIMIT_BYTES = 1 << 28
"""Limit of one message; the longest carries the files of a tokenizer."""

LOG_LIMIT_BYTES = 10 << 20
"""Limit of a rank's log file."""

STDERR_TAIL_LINES = 12
"""Number of last lines of standard error kept for error messages."""

OUTPUT_PATIENCE_S = 1.0
"""Time to read the rest of standard error after the exit. A job of the login shell can hold it open."""

EXIT_PATIENCE_S = 0.5
"""Time for a process to exit after its guard reported the end. A job of the login shell can keep ssh from exiting."""


class HostProcess:
    """A running rank.

    Args:
        rank: rank of the process.
        command: command line.
        environment: environment variables.
        on_message: callback, called from a thread with (rank, message) for each message, and with (rank, None) when
            the process closes its output.
        preamble: bytes written to its input first, such as the script for the shell of a host.
        mark: line that precedes its messages and its standard error; empty for none. What a login shell prints before
            it is only used in error messages, until the mark arrives. After it, lines without the prefix of the
            mark (`message_prefix`) are dropped.
        sends_heartbeats: whether an `alive` message is sent when nothing else was sent for HEARTBEAT_S.
        log: file to which its standard error and its notes are appended.
    """

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_message: Callable[[int, Message | None], None],
        preamble: bytes = b"",
        mark: bytes = b"",
        *,
        sends_heartbeats: bool = False,
        log: Path | None = None,
    ):
        self.rank = rank
        self._sends_heartbeats = sends_heartbeats
        self._log, self._logged_bytes = log, 0
        self._on_message = on_message
        self._last_lines: deque[str] = deque(maxlen=STDERR_TAIL_LINES)
        # In its own session, Ctrl-C in the terminal reaches only the front, which then stops the ranks in order.
        self._process = subprocess.Popen(
            command,
            env={name: value for name, value in environment.items() if name != PREFIX_VARIABLE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._mark, self._prefix = mark, message_prefix(mark)
        self._reported_code: int | None = None
        self._has_foreign_lines = False
        self._shell_lines: deque[str] = deque(maxlen=STDERR_TAIL_LINES)
        self._has_started = not mark
        self._has_read_rest = False
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._outbox.put(preamble)
        loops = (self._read_messages, self._read_stderr, self._write_messages)
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, kind: str, **fields: object) -> None:
        """Queue a message, which a thread writes; safe in a signal handler."""
        self.write(encode(kind, **fields))

    def write(self, line: bytes) -> None:
        """Queue an encoded message."""
        self._outbox.put(line)

    @property
    def num_unsent(self) -> int:
        """Number of queued messages that the thread has not begun to write."""
        return self._outbox.qsize()

    def close_input(self) -> None:
        """Close the input; a rank exits when its input ends."""
        self._outbox.put(None)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        self._process.send_signal(number)

    def wait(self, limit_s: float) -> bool:
        """Wait up to `limit_s` for the process to exit; return whether it has."""
        try:
            self._process.wait(max(limit_s, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def release(self, limit_s: float) -> None:
        """Wait for the process to exit, then close the pipes."""
        self.wait(limit_s)
        for thread, pipe in zip(self._threads, (self._process.stdout, self._process.stderr), strict=False):
            thread.join(limit_s)
            if pipe is not None and not thread.is_alive():  # cleanup kills a process that still holds the other end
                pipe.close()

    @property
    def signal_number(self) -> int | None:
        """Signal that ended the process, as reported by its guard; None if it exited by itself."""
        code = self.exit_code or 0
        number = -code if code < 0 else code - 128
        return number if number in set(signal.Signals) and code != SSH_FAILED else None

    @property
    def has_confirmed_exit(self) -> bool:
        """Whether its guard (local or remote) reported an exit code: the process and its children are gone."""
        code = self.exit_code
        return code is not None and 0 <= code != SSH_FAILED

    @property
    def exit_code(self) -> int | None:
        """Exit code, as its guard reported it or else of the process; None while it runs."""
        return self._process.poll() if self._reported_code is None else self._reported_code

    @property
    def has_started(self) -> bool:
        """Whether the command has started, after the login shell."""
        return self._has_started

    @property
    def output(self) -> str:
        """Last lines of standard error, complete after the exit; before the start, also those of the login shell."""
        if self.exit_code is not None and not self._has_read_rest:
            self._threads[1].join(OUTPUT_PATIENCE_S)
            self._has_read_rest = True
        return "\n".join(self._tail)

    @property
    def last_line(self) -> str:
        """Last line of the output; empty if there is none."""
        return self._tail[-1] if self._tail else ""

    @property
    def _tail(self) -> list[str]:
        shell_lines = [] if self._has_started else list(self._shell_lines)
        return [*shell_lines, *self._last_lines]

    def describe_exit(self) -> str:
        """Describe the exit: the signal or the exit code, and the last lines of output."""
        if not self.wait(1):
            return "closed its output but still runs"
        number = self.signal_number
        exit_text = f"exited with code {self.exit_code}"
        if number is not None:
            exit_text = f"was ended by {signal.Signals(number).name}"
        lines = "\n".join(f"  {line}" for line in self.output.splitlines())
        return f"{exit_text}; its last lines:\n{lines}" if lines else exit_text

    def _read_messages(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in iter(lambda: stdout.readline(LINE_LIMIT_BYTES), b""):
            if not self._has_started:
                self._has_started = line.rstrip(b"\n") == self._mark
                self._shell_lines.append(line.decode(errors="replace").rstrip())
                continue
            _, prefix, text = line.partition(self._prefix) if self._prefix else (b"", b"", line)
            if prefix != self._prefix:
                self._note_foreign_line(line)
                continue
            try:
                message = decode(text)
                if message["kind"] == "exited":
                    self._end_after_report(message["code"])
                    break
                if message["kind"] == "note":
                    self._write_log(f"{message['text']}\n".encode())
                else:
                    self._on_message(self.rank, message)
            except KimiMlxError as error:
                self._on_message(self.rank, {"kind": "failed", "text": f"sent {error.message}"})
                break
        self._on_message(self.rank, None)

    def _note_foreign_line(self, line: bytes) -> None:
        if not self._has_foreign_lines and line.strip():
            self._has_foreign_lines = True
            LOG.debug("rank %d: dropping lines that are not ours, such as %r", self.rank, line[:80])

    def _end_after_report(self, code: int) -> None:
        """Record the exit code that the guard reported; stop the process if it does not exit by itself."""
        self._reported_code = code
        for stop_signal in (signal.SIGTERM, signal.SIGKILL):
            if not self.wait(EXIT_PATIENCE_S):
                self.signal(stop_signal)
        self.wait(EXIT_PATIENCE_S)

    def _write_messages(self) -> None:
        assert self._process.stdin is not None
        # The end of its output, not a failed write, shows that a rank is gone.
        with contextlib.suppress(OSError), self._process.stdin as pipe:
            while (line := self._next_line()) is not None:
                pipe.write(line)
                pipe.flush()

    def _next_line(self) -> bytes | None:
        try:
            return self._outbox.get(timeout=HEARTBEAT_S if self._sends_heartbeats else None)
        except queue.Empty:
            return encode("alive")

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if self._mark and line.rstrip(b"\n") == self._mark:
                self._last_lines.clear()  # of the login shell
                continue
            self._last_lines.append(line.decode(errors="replace").rstrip())
            self._write_log(line)

    def _write_log(self, line: bytes) -> None:
        self._logged_bytes += len(line)
        if self._log is not None and self._logged_bytes < LOG_LIMIT_BYTES:
            with contextlib.suppress(OSError), self._log.open("ab") as file:  # a full disk must not stop a rank
                file.write(line)


def terminate_all(processes: Sequence[HostProcess], patience_s: float) -> None:
    """Stop ranks and wait for them: close their input, then send SIGTERM, then SIGKILL, each `patience_s` later."""
    for process in processes:
        process.close_input()
    for stop_signal in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + patience_s
        running = [process for process in processes if not process.wait(end - time.monotonic())]
        for process in running:
            process.signal(stop_signal)
    for process in processes:
        process.release(patience_s)

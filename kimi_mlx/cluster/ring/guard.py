"""A guard: run a rank's module as a child process, forward its input, and end it when the front is gone.

MLX's ring holds Python's lock while it connects, so a rank cannot watch its own input then. The guard ends the child
when its own input ends (the front or its ssh session is gone), when the input stops (the network is gone: the front
sends a message every second), or on a signal. It closes the child's input, waits for the time that the
child has requested, then sends SIGTERM, and SIGKILL last. It removes the child's temporary folder.

The guard also holds copies of the ring's sockets. If the child is lost, they stay open for HOLD_S, because MLX's ring
waits forever in a rank that sees a connection fail. Meanwhile the front tells the other ranks to end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from kimi_mlx.cluster.channel.messages import encode, encode_error, own_prefix
from kimi_mlx.cluster.hosts.launch import rank_command
from kimi_mlx.cluster.ring.end_limits import KILL_S
from kimi_mlx.errors import RingError
from kimi_mlx.temporary import temporary_folder

POLL_INTERVAL_S = 0.1
"""Interval at which the end of the child is checked."""

HOLD_S = 5
"""Time for which the sockets of a lost rank stay open."""

SEND_LIMIT_S = 1.0
"""Time limit for a message to the front."""

MAX_SOCKETS = 64

EXIT_KILLED = 9
"""Exit code of a guard that had to kill its child. A child that something else has killed gives 128 + SIGKILL."""

GUARD_VARIABLE = "KIMI_MLX_GUARD"
"""Environment variable with the file descriptor of a socket to the guard. Over it a rank sends the ring's sockets, and
lines with the seconds that it may need to end. A rank that has sent none has no memory to release, and is ended by
SIGTERM at once."""

END_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def guard_command(module: str, python: str, tag: str, silence_s: float | None) -> list[str]:
    """Return the command that runs `main` of a module under a guard.

    Args:
        module: dotted name of the module.
        python: path of the interpreter.
        tag: token that marks the processes and their folder, so that leftovers can be found.
        silence_s: seconds without input after which the child is ended; None for no limit (a front on this host).
    """
    return [*rank_command(__name__, python), module, tag, str(silence_s or 0)]


def main() -> None:
    """Run the module. The exit code is the child's, 128 plus the number of the signal that ended it, or EXIT_KILLED."""
    module, tag, silence_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    signals: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in END_SIGNALS:
        signal.signal(number, on_signal)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(f"{tag}-"))
        except OSError as error:
            _send(encode_error(temporary_files_error(error), rank=None))
            sys.exit(1)
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "TMPDIR": str(folder.path), GUARD_VARIABLE: str(theirs.fileno())}
        command, inherited = [*rank_command(module), tag], (theirs.fileno(), folder.lock)
        child = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=inherited)
        theirs.close()
        guard = _Guard(child, ours, silence_s, signals)
        code = guard.run()
        if code:
            hold(guard.sockets)
    code = code if code >= 0 else 128 - code
    _send(encode("exited", code=code))
    sys.exit(code)


def temporary_files_error(error: OSError) -> RingError:
    """Return the error for a host on which a rank cannot write its temporary files."""
    return RingError(
        f"`{os.uname().nodename}` cannot write temporary files: {error.strerror or error}",
        hint="free disk space there, or use another folder: `kimi-mlx launch --env TMPDIR=/path ...`",
    )


def hold(sockets: Sequence[int]) -> None:
    """Keep sockets open for HOLD_S, in a process of its own."""
    if sockets:
        null = subprocess.DEVNULL
        subprocess.Popen(["sleep", str(HOLD_S)], stdin=null, stdout=null, stderr=null, pass_fds=sockets)


class _Guard:
    """The guard of one child.

    Args:
        child: process with a pipe as its standard input.
        connection: socket to the child.
        silence_s: seconds without input after which the child is ended; 0 for no limit.
        signals: signals that this process has received.

    Attributes:
        sockets: file descriptors of the child's sockets.
    """

    def __init__(
        self, child: subprocess.Popen[bytes], connection: socket.socket, silence_s: float, signals: Sequence[int]
    ):
        assert child.stdin is not None
        self._child, self._input, self._connection = child, child.stdin, connection
        self._silence_s, self._signals = silence_s, signals
        self._pending = bytearray()
        self._is_connected = self._has_input = True
        self._received_at = time.monotonic()
        self._end_limit_s, self._limit_set_at = 0.0, time.monotonic()
        self.sockets: list[int] = []
        os.set_blocking(self._input.fileno(), False)  # a child that is stopped must not stop us

    def run(self) -> int:
        """Forward input until the child ends, the input ends, or nothing arrives for too long; return the exit code."""
        while self._has_input and not self._signals:
            if (code := self._child.poll()) is not None:
                return code
            if self._silence_s and time.monotonic() - self._received_at > self._silence_s:
                _print(f"received nothing from the front for {self._silence_s:.0f} s")
                break
            self._transfer()
        return self._end()

    def _end(self) -> int:
        """End the child; return its exit code, or EXIT_KILLED."""
        self._has_input = False
        self._child.send_signal(signal.SIGCONT)  # a stopped process cannot end by itself
        if (code := self._wait(self._end_limit_s)) is not None:
            return code
        self._child.terminate()
        if (code := self._wait(KILL_S)) is not None:
            return code
        _print("did not end by itself and was killed")
        self._child.kill()
        self._child.wait()
        return EXIT_KILLED

    def _wait(self, limit_s: float) -> int | None:
        """Wait for the child, for `limit_s` or the time that it asks for meanwhile; return its exit code, or None."""
        began = time.monotonic()
        while (code := self._child.poll()) is None:
            if not self._pending and not self._input.closed:
                self._input.close()
            has_new_limit = self._limit_set_at > began
            end = self._limit_set_at + self._end_limit_s if has_new_limit else began + limit_s
            if time.monotonic() > end:
                return None
            self._transfer()
        return code

    def _transfer(self) -> None:
        """Forward input, and read messages of the child; wait for at most POLL_INTERVAL_S."""
        readers = [0] * self._has_input + [self._connection.fileno()] * self._is_connected
        readable, writable, _ = select.select(readers, [self._input] if self._pending else [], [], POLL_INTERVAL_S)
        if 0 in readable:
            data = os.read(0, 1 << 16)
            self._has_input = bool(data)
            self._pending += data
            self._received_at = time.monotonic()
        if self._connection.fileno() in readable:
            self._receive()
        if writable:
            try:
                del self._pending[: os.write(self._input.fileno(), self._pending)]
            except BrokenPipeError:  # the child is ending
                self._pending.clear()

    def _receive(self) -> None:
        """Read the child's sockets and the time that it may need to end."""
        data, sockets, _, _ = socket.recv_fds(self._connection, 1 << 12, MAX_SOCKETS)
        self._is_connected = bool(data)
        self.sockets += sockets
        if limits := data.split():
            self._end_limit_s, self._limit_set_at = float(limits[-1]), time.monotonic()


def _send(message: bytes) -> None:
    """Send a short message to the front, if there is space for it: the network may be gone."""
    with contextlib.suppress(OSError):  # the front is gone
        if select.select([], [1], [], SEND_LIMIT_S)[1]:
            os.write(1, own_prefix() + message)


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # the front is gone
        print(text, file=sys.stderr, flush=True)

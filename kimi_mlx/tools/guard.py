"""The process between the chat and an MCP server over stdio. It starts the server, and runs as a script by its path.

It limits what the server sends, so that a flood costs the chat neither memory nor time: messages that are too long are
replaced by an error, notifications that the chat does not use and lines that are not messages are dropped, and the rest
is slowed down. When the chat ends, however it was killed, it ends the server and all processes of its group.

Only the standard library, so that it starts in some 20 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

MAX_MESSAGE_BYTES = 16 * 2**20
"""Maximum size of a message. Pictures in results take a few MB."""

MAX_PARSED_BYTES = 2**16
"""Messages up to this size are parsed; longer ones can only be results."""

EDGE_BYTES = 256
"""Number of bytes at each end of a message that is too long, in which its id is searched."""

PAUSE_S = 0.001
"""Pause after each message: at most 1,000 a second."""

REQUEST_PAUSE_S = 0.05
"""Pause after each request or notification of the server."""

MAX_COMPLAINTS = 20
"""Maximum number of lines on stderr about lines that are not messages."""

GRACE_S = 1.5
"""Time for the server to exit once its input is closed."""

TERMINATE_S = 1.0
"""Time between SIGTERM and SIGKILL."""

PARENT_CHECK_S = 1.0
"""Interval of the check that the chat still runs."""

RESULT_ERROR = -32000
"""JSON-RPC code of the error that replaces a message that is too long."""

ID = re.compile(rb'"id"\s*:\s*(\d+|"[^"\\]{1,64}")')
KEPT_NOTIFICATIONS = (b"notifications/tools/list_changed", b"notifications/cancelled")


def run(command: Sequence[str]) -> int:
    """Run a server until it or the chat ends; return the exit code of this process.

    Args:
        command: program of the server and its arguments.
    """
    parent = os.getppid()
    is_over = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: is_over.set())
    try:
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as error:
        _report(f"`{command[0]}` cannot be started: {error.strerror}")
        return 127
    assert server.stdin is not None
    assert server.stdout is not None
    output = threading.Thread(target=_forward_output, args=(cast("BinaryIO", server.stdout), is_over), daemon=True)
    output.start()
    threading.Thread(target=_forward_input, args=(server.stdin.fileno(), is_over), daemon=True).start()
    threading.Thread(target=_wait, args=(server, is_over), daemon=True).start()
    while not is_over.wait(PARENT_CHECK_S):
        if os.getppid() != parent:
            break
    _end(server)
    output.join(GRACE_S)
    _report(_describe_end(server.returncode))
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # children of the server, and this process
    return 0


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a server: close its input, then SIGTERM, then SIGKILL to its group."""
    with contextlib.suppress(OSError):
        cast("BinaryIO", server.stdin).close()
    for number, grace_s in ((None, GRACE_S), (signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, TERMINATE_S)):
        if number == signal.SIGTERM:
            os.killpg(0, number)
        elif number is not None:
            server.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(grace_s)
            return


def _wait(server: subprocess.Popen[bytes], is_over: threading.Event) -> None:
    server.wait()
    is_over.set()


def _describe_end(code: int | None) -> str:
    if code is None:
        return "the server cannot be killed"
    return f"the server exited with code {code}" if code >= 0 else f"the server was ended by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _report(text: str) -> None:
    """Write a line to stderr, which is that of the server too."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


def _forward_input(server: int, is_over: threading.Event) -> None:
    """Copy this process's input to the server."""
    with contextlib.suppress(OSError):
        while data := os.read(0, 2**16):
            _write_all(server, data)
    is_over.set()


def _forward_output(stream: BinaryIO, is_over: threading.Event) -> None:
    """Copy the messages of the server to this process's output."""
    messages = MessageFilter()
    with contextlib.suppress(OSError, ValueError):
        while line := stream.readline(MAX_MESSAGE_BYTES + 1):
            if not line.endswith(b"\n") and len(line) > MAX_MESSAGE_BYTES:
                message, pause_s = messages.replace_long(line[:EDGE_BYTES], _skip_line(stream)), 0.0
            else:
                message, pause_s = messages.check(line)
            if message:
                _write_all(1, message)
            time.sleep(pause_s)
        return
    is_over.set()


def _skip_line(stream: BinaryIO) -> bytes:
    """Read to the end of a line without keeping it; return its last bytes."""
    last = b""
    while chunk := stream.readline(2**20):
        last = (last + chunk)[-EDGE_BYTES:]
        if chunk.endswith(b"\n"):
            break
    return last


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


class MessageFilter:
    """Decides which lines of a server are forwarded, and how fast."""

    def __init__(self) -> None:
        self._num_complaints = 0

    def check(self, line: bytes) -> tuple[bytes | None, float]:
        """Return a line to forward, or None, and the pause after it in seconds."""
        if not line.strip():
            return None, 0.0
        if len(line) > MAX_PARSED_BYTES:
            return line, PAUSE_S
        if b'"id"' not in line and line.startswith(b"{") and not any(name in line for name in KEPT_NOTIFICATIONS):
            return None, 0.0  # a notification; not parsed, because there may be millions
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self._complain(line)
            return None, 0.0
        fields = cast("dict[str, Any]", message)
        if "method" not in fields:
            return line, PAUSE_S
        return line, REQUEST_PAUSE_S

    def replace_long(self, head: bytes, tail: bytes) -> bytes | None:
        """Return an error in place of a message that is too long, or None if its id is not found at either end.

        Args:
            head: first EDGE_BYTES of the message.
            tail: last EDGE_BYTES of the message.
        """
        megabytes = MAX_MESSAGE_BYTES // 2**20
        _report(f"the server sent a message of more than {megabytes} MiB, which was dropped")
        found = ID.search(head) or ID.search(tail)
        if found is None:
            return None
        error = {"code": RESULT_ERROR, "message": f"the result has more than {megabytes} MiB"}
        return b'{"jsonrpc":"2.0","id":%s,"error":%s}\n' % (found[1], json.dumps(error).encode())

    def _complain(self, line: bytes) -> None:
        self._num_complaints += 1
        if self._num_complaints <= MAX_COMPLAINTS:
            _report(f"not a message: {line.strip()[:80].decode(errors='replace')}")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

"""Text that is typed or pasted between two prompts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import termios
import threading

from kimi_mlx.cli.chat.input.terminal_modes import READING

POLL_S = 0.1
LARGE_BYTES = 2048
"""Number of waiting bytes from which they are read: half of what a terminal holds on Linux."""

CHUNK_BYTES = 65536


class TypedAhead:
    """Keeps what is typed between two prompts.

    Short texts stay in the terminal. Of a long one, a terminal holds only the first 4096 bytes: it would not see the
    Ctrl-C behind them, which stops the answer. So a thread reads long ones.

    Args:
        descriptor: file descriptor of the terminal.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._data = b""
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to keep typed text."""
        self._is_over.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> bytes:
        """Return what was typed since the last call, and leave the terminal to the prompt."""
        self.close()
        while select.select([self._descriptor], [], [], 0)[0] and (data := os.read(self._descriptor, CHUNK_BYTES)):
            self._data += data
        data, self._data = self._data, b""
        return data

    def close(self) -> None:
        """Leave the terminal, with its waiting text, to others."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are to wake the main thread
        with contextlib.suppress(OSError):  # the terminal was closed: the prompt reports it
            while not self._is_over.wait(POLL_S):
                while self._num_waiting() >= LARGE_BYTES and READING.acquire(blocking=False):
                    try:
                        self._data += os.read(self._descriptor, CHUNK_BYTES)
                    finally:
                        READING.release()
                    self._is_over.wait(POLL_S / 20)

    def _num_waiting(self) -> int:
        """Return the number of bytes that can be read."""
        return int(struct.unpack("i", fcntl.ioctl(self._descriptor, termios.FIONREAD, b"\0" * 4))[0])

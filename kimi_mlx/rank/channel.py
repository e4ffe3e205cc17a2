"""A rank's end of the channel to the front. The messages are described in kimi_mlx.cluster.channel.messages.

A rank ends when its input ends, or on a signal. The end is the last command: all ranks execute it after the same step.
A rank that is in a collective with a lost peer never reaches it, so its collectives are aborted after a while.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import BinaryIO, NoReturn

import mlx.core as mx

from kimi_mlx.cluster.channel.messages import HEARTBEAT_S, Message, decode, encode, encode_error, own_prefix
from kimi_mlx.cluster.ring.end_limits import ABORT_AFTER_S, end_limit_s, unload_limit_s
from kimi_mlx.cluster.ring.guard import END_SIGNALS
from kimi_mlx.cluster.ring.link_watch import LinkWatch
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.parallel.ring_sockets import abort_collectives
from kimi_mlx.rank.guard_socket import GuardSocket
from kimi_mlx.rank.received_patches import ReceivedPatches
from kimi_mlx.runtime.unload import release_memory

EXIT_ENDED, EXIT_FAILED = 0, 1
"""Exit codes: EXIT_ENDED if the front ended the rank between two steps, EXIT_FAILED otherwise."""


class Channel:
    """The two pipes to the front, and the threads that read messages and send heartbeats.

    Args:
        source: pipe from the front.
        sink: pipe to the front.

    Attributes:
        num_received: number of commands received so far; other ranks may have received fewer or more.
        num_consumed: number of commands taken with `next_command`.
        links: watch over the links to the neighbours, for the heartbeats; None on a single host.
        patches: patches of images that requests need, on rank 0.
        cleanup: functions to call before the memory is released.
        interrupt: function that makes a step fail that waits for anything but other ranks; called by any thread.
        sockets: file descriptors of the connections of MLX's ring; empty before `enable_graceful_exit`.
    """

    def __init__(self, source: BinaryIO, sink: BinaryIO):
        self._source, self._sink = source, sink
        self._prefix = own_prefix()
        self._write_lock = threading.Lock()
        self._end_lock = threading.RLock()  # reentrant: a signal handler may run while its thread holds it
        self._step, self._work = 0, "idle"
        self._last_message_at = time.monotonic()
        self._commands: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.num_received = 0
        self.num_consumed = 0
        self.links: LinkWatch | None = None
        self.patches = ReceivedPatches()
        self.cleanup = contextlib.ExitStack()
        self.interrupt: Callable[[], None] = lambda: None
        self._guard = GuardSocket()
        self._end_limit_s = 0.0
        self.sockets: Sequence[int] = ()
        self._is_ending = self._has_aborted = False
        self._signal: int | None = None  # the signal that is the reason for the end, if any

    def send(self, kind: str, **fields: object) -> None:
        """Send a message."""
        self.write(encode(kind, **fields))

    def write(self, *lines: bytes) -> None:
        """Send encoded messages together. If the front is gone, end the process."""
        if self._has_aborted:  # the messages were computed from invalid data
            return
        self._write(*lines)

    def report_progress(self, work: str) -> None:
        """Report progress with the next heartbeat.

        Args:
            work: current work, such as `load`, `prefill` or `decode`; the front chooses its timeout by it.
        """
        if self._has_aborted:
            sys.exit()
        self._work = work
        self._step += 1
        if self._end_limit_s and self._end_limit_s != end_limit_s(work):
            self._set_end_limit(end_limit_s(work))

    def exit_if_ending(self) -> None:
        """Exit if this process is ending. For long work without steps, such as loading."""
        if self._is_ending:
            sys.exit(EXIT_FAILED)  # other ranks may be in a collective, so the guard must hold the sockets

    def next_command(self) -> Message:
        """Return the next command; wait until there is one. Exit if it is the end."""
        command = self._commands.get()
        self.num_consumed += 1
        if command is None:
            sys.exit()
        return command

    def start_threads(self) -> None:
        """Start the threads that read messages and send heartbeats."""
        threading.Thread(target=self._read_messages, daemon=True).start()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def enable_graceful_exit(self, sockets: Sequence[int]) -> None:
        """From now on, release memory before the process ends. Call this in the main thread, once connected.

        Before this call a signal ends the process at once: while MLX's ring connects, it holds Python's lock, so no
        Python code can run.

        Args:
            sockets: file descriptors of the connections of MLX's ring.
        """
        self.sockets = sockets
        self._guard.hold(sockets)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)  # a handler does not run while the main thread is in a collective
        for number in END_SIGNALS:
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._wait_for_signal, args=(reader,), daemon=True).start()
        self._set_end_limit(end_limit_s(self._work))

    def begin_unload(self, error: BaseException, rank: int | None) -> int:
        """Report why the process ends, and that it releases its memory now; return the exit code.

        Args:
            error: SystemExit at the end of the input, else the error that ends the process.
            rank: number of this rank, if it is known.
        """
        for number in END_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        is_graceful = (
            isinstance(error, SystemExit) and not error.code and not self._has_aborted and self._signal is None
        )
        if not is_graceful:
            self._report(error, rank)
            self._abort_collectives(0)  # a step in flight may wait for other ranks
        size = mx.get_active_memory()
        self._set_end_limit(unload_limit_s(size))
        self._write(encode("unloading", bytes=size))
        if self._signal is not None:
            return 128 + self._signal
        return EXIT_ENDED if is_graceful else EXIT_FAILED

    def end_unload(self, left_bytes: int) -> None:
        """Report that the memory is released."""
        self._write(encode("unloaded", bytes=left_bytes))

    def _report(self, error: BaseException, rank: int | None) -> None:
        if self._signal is not None:
            self._write(encode("failed", text=f"was ended by {signal.Signals(self._signal).name}"))
        elif self._is_ending:
            return  # the front does not listen any more
        elif isinstance(error, KimiMlxError):
            self._write(encode_error(error, rank))
        else:
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
            text = traceback.format_exception_only(type(error), error)[-1].strip()
            self._write(encode("failed", text=f"failed: {text}"))

    def _set_end_limit(self, seconds: float) -> None:
        self._end_limit_s = seconds
        self._guard.set_end_limit(seconds)
        self._write(encode("end_limit", seconds=seconds))

    def _write(self, *lines: bytes) -> None:
        try:
            with self._write_lock:
                self._sink.write(b"".join(self._prefix + line for line in lines))
                self._sink.flush()
        except OSError:  # the front is gone
            self._end()

    def _end(self, number: int | None = None, wait_s: float = ABORT_AFTER_S) -> None:
        """Make the main thread exit. Any thread may call this, also more than once.

        Args:
            number: signal that is the reason; None for the end of the input.
            wait_s: time until the collectives are aborted.
        """
        with self._end_lock:
            if self._is_ending:
                return
            self._is_ending, self._signal = True, number
            self._commands.put(None)
            self.num_received += 1
        threading.Thread(target=self._abort_collectives, args=(wait_s,), daemon=True).start()

    def _abort_collectives(self, wait_s: float) -> None:
        """Make all collectives return, now and later."""
        time.sleep(wait_s)
        with self._end_lock:
            if not self._has_aborted:
                self._has_aborted = True
                abort_collectives(self.sockets)
                self.interrupt()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._end(number, 0)
        sys.exit()

    def _wait_for_signal(self, reader: int) -> None:
        self._end(os.read(reader, 1)[0], 0)

    def _read_messages(self) -> None:
        try:
            for line in self._source:
                message = decode(line)
                self._last_message_at = time.monotonic()
                if message["kind"] == "lost":
                    self._end(wait_s=0)
                elif message["kind"] in ("patches", "drop_patches"):
                    self.patches.on_message(message)
                elif message["kind"] != "alive":
                    with self._end_lock:
                        self._commands.put(message)
                        self.num_received += 1
        except Exception as error:  # whatever it is: nothing else would report that this rank gets no commands any more
            is_known = isinstance(error, (KimiMlxError, OSError))
            reason = str(error) if is_known else f"{type(error).__name__}: {error}"
            self._write(encode("failed", text=f"cannot read its commands: {reason}"))
            self._skip_messages()
        self._end()

    def _skip_messages(self) -> None:
        """Wait until the front closes the input. By then the other ranks know that this one is lost.

        If this rank closed its connections earlier, a collective of another rank could wait forever.
        """
        with contextlib.suppress(OSError):
            for _ in self._source:
                pass

    def _send_heartbeats(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            ages = {} if self.links is None else self.links.ages()
            front_age_s = time.monotonic() - self._last_message_at
            memory = mx.get_active_memory()
            self._write(encode("alive", work=self._work, step=self._step, links=ages, front=front_age_s, memory=memory))


def run_rank(serve: Callable[[Channel, Message], None]) -> NoReturn:
    """Run the process of a rank. Its exit code is 0 if the front ended it, and 1 after an error.

    Args:
        serve: function of the channel and the `start` message. It must not return, only raise.
    """
    channel = Channel(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # keep the output of libraries out of the messages
    rank, code = None, EXIT_FAILED
    try:
        start = decode(sys.stdin.buffer.readline())
        rank = start["rank"]
        channel.start_threads()
        serve(channel, start)
    except BaseException as error:  # it keeps the frames of serve(), and so the model, until the end of this block
        code = channel.begin_unload(error, rank)
    with contextlib.suppress(RuntimeError):  # MLX's, from a collective that failed
        channel.cleanup.close()
    channel.interrupt = lambda: None  # it would keep the model in memory
    channel.end_unload(release_memory())
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)  # do not wait for the reading thread or for MLX's threads

"""A rank's side of the channel to the front; kimi_mlx.cluster.ring.messages says what goes through it."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import BinaryIO, NoReturn

from kimi_mlx.cluster.ring.link_watch import LinkWatch
from kimi_mlx.cluster.ring.messages import HEARTBEAT_S, Message, decode, encode, encode_error
from kimi_mlx.errors import KimiMlxError


class Channel:
    """The two pipes, and the threads that serve them."""

    def __init__(self, source: BinaryIO, sink: BinaryIO):
        self._source, self._sink = source, sink
        self._lock = threading.Lock()
        self._step, self._work = 0, "idle"
        self._heard = time.monotonic()
        self._commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.num_received = 0
        """How many commands have come so far."""
        self.num_consumed = 0
        """How many of them were taken."""
        self.links: LinkWatch | None = None

    def send(self, kind: str, **fields: object) -> None:
        """Write a message."""
        self.write(encode(kind, **fields))

    def write(self, line: bytes) -> None:
        """Write an encoded message; without a front there is nothing left to do."""
        try:
            with self._lock:
                self._sink.write(line)
                self._sink.flush()
        except OSError:
            os._exit(0)

    def report_progress(self, work: str) -> None:
        """Note for the next heartbeat what is being done, and that it goes on."""
        self._work = work
        self._step += 1

    def next_command(self) -> Message:
        """Take the next command, wait for it if there is none."""
        command = self._commands.get()
        self.num_consumed += 1
        return command

    def start_threads(self) -> None:
        """Start reading messages and sending heartbeats."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _read(self) -> None:
        for line in self._source:
            message = decode(line)
            self._heard = time.monotonic()
            if message["kind"] != "alive":
                self._commands.put(message)
                self.num_received += 1
        # The front has closed our input or is gone. A collective may be waiting for a peer: leave at once.
        os._exit(0)

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(HEARTBEAT_S):
            ages = {} if self.links is None else self.links.ages()
            front = time.monotonic() - self._heard
            self.send("alive", work=self._work, step=self._step, links=ages, front=front)


def run_rank(serve: Callable[[Channel, Message], None]) -> NoReturn:
    """The life of a rank's process; its exit code is 0 if the front ended it, 1 after an error.

    Args:
        serve: gets the channel and the `start` message, and stays until it fails.
    """
    channel = Channel(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # whatever a library prints must not get between the messages
    rank = None
    try:
        start = decode(sys.stdin.buffer.readline())
        rank = start["rank"]
        channel.start_threads()
        serve(channel, start)
    except KimiMlxError as error:
        channel.write(encode_error(error, rank))
    except Exception:  # the front shows the last lines of what is written here
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # without waiting for the thread that reads, or for MLX's threads

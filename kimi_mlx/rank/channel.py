"""A rank's end of the channel to the front. The messages are described in kimi_mlx.cluster.channel.messages."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import BinaryIO, NoReturn

from kimi_mlx.cluster.channel.messages import HEARTBEAT_S, Message, decode, encode, encode_error
from kimi_mlx.cluster.ring.link_watch import LinkWatch
from kimi_mlx.errors import KimiMlxError


class Channel:
    """The two pipes to the front, and the threads that read messages and send heartbeats.

    Args:
        source: pipe from the front.
        sink: pipe to the front.

    Attributes:
        num_received: number of commands received so far; other ranks may have received fewer or more.
        num_consumed: number of commands taken with `next_command`.
        links: watch over the links to the neighbours, for the heartbeats; None on a single host.
    """

    def __init__(self, source: BinaryIO, sink: BinaryIO):
        self._source, self._sink = source, sink
        self._lock = threading.Lock()
        self._step, self._work = 0, "idle"
        self._last_message_at = time.monotonic()
        self._commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.num_received = 0
        self.num_consumed = 0
        self.links: LinkWatch | None = None

    def send(self, kind: str, **fields: object) -> None:
        """Send a message."""
        self.write(encode(kind, **fields))

    def write(self, line: bytes) -> None:
        """Send an encoded message. If the front is gone, end the process."""
        try:
            with self._lock:
                self._sink.write(line)
                self._sink.flush()
        except OSError:
            os._exit(0)

    def report_progress(self, work: str) -> None:
        """Report progress with the next heartbeat.

        Args:
            work: current work, such as `load`, `prefill` or `decode`; the front chooses its timeout by it.
        """
        self._work = work
        self._step += 1

    def next_command(self) -> Message:
        """Return the next command; wait until there is one."""
        command = self._commands.get()
        self.num_consumed += 1
        return command

    def start_threads(self) -> None:
        """Start the threads that read messages and send heartbeats."""
        threading.Thread(target=self._read_messages, daemon=True).start()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def _read_messages(self) -> None:
        for line in self._source:
            message = decode(line)
            self._last_message_at = time.monotonic()
            if message["kind"] != "alive":
                self._commands.put(message)
                self.num_received += 1
        # The front closed our input or is gone. A collective may be waiting for a peer, so end the process here.
        os._exit(0)

    def _send_heartbeats(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            ages = {} if self.links is None else self.links.ages()
            front_age_s = time.monotonic() - self._last_message_at
            self.send("alive", work=self._work, step=self._step, links=ages, front=front_age_s)


def run_rank(serve: Callable[[Channel, Message], None]) -> NoReturn:
    """Run the process of a rank. Its exit code is 0 if the front ended it, and 1 after an error.

    Args:
        serve: function of the channel and the `start` message. It must not return, only raise.
    """
    channel = Channel(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # keep the output of libraries out of the messages
    rank = None
    try:
        start = decode(sys.stdin.buffer.readline())
        rank = start["rank"]
        channel.start_threads()
        serve(channel, start)
    except KimiMlxError as error:
        channel.write(encode_error(error, rank))
    except Exception:  # the front shows the last lines of our stderr
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # do not wait for the reading thread or for MLX's threads

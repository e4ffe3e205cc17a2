"""Simulated latency between local ranks: a relay that delays all data by a fixed time in both directions.

Each chunk of data has its own due time, so any amount can be in flight: the relay adds latency, but keeps the
bandwidth. It is a separate process, and adds 0.1 to 0.2 ms of its own. `hostfile_rewriter` gives every rank a hostfile
in which the next rank's address is the relay's: MLX's ranks listen on their own address and connect to the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from kimi_mlx.cluster.hosts.launch import rank_command
from kimi_mlx.errors import RingError

RETRY_DELAY_S = 0.05
"""Delay between attempts to connect to a rank that does not listen yet."""

CONNECT_TIMEOUT_S = 60.0
"""Time limit for these attempts."""

STOP_TIMEOUT_S = 5.0
"""Time limit for the relay to exit once its input is closed."""


@contextlib.contextmanager
def slow_links(delay_ms: float) -> Iterator[Callable[[str], list[str]]]:
    """Start a relay, and yield a function that rewrites a ring's hostfile for each rank.

    Args:
        delay_ms: delay in each direction.

    Raises:
        RingError: raised by the yielded function if the relay has exited.
    """
    command = [*rank_command(__name__), str(delay_ms / 1000)]
    relay = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
    )
    assert relay.stdin is not None
    assert relay.stdout is not None
    sink, source = relay.stdin, relay.stdout

    def hostfile_rewriter(file: str) -> list[str]:
        try:
            sink.write(file + "\n")
            return ring_views(json.loads(file), json.loads(source.readline()))
        except (OSError, ValueError) as error:
            raise RingError(
                f"the relay of --link-delay-ms exited with code {relay.poll()}", hint="try again"
            ) from error

    try:
        yield hostfile_rewriter
    finally:
        with contextlib.suppress(OSError):
            sink.close()
        try:
            relay.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            relay.kill()
            relay.wait()
        source.close()


def ring_views(nodes: Sequence[Sequence[str]], relays: Sequence[Sequence[str]]) -> list[str]:
    """Return the hostfile of each rank: the next rank's address is the relay's, all others are unchanged.

    Args:
        nodes: addresses of each rank.
        relays: the relay's addresses for each rank.
    """
    size = len(nodes)
    return [
        json.dumps([relays[to] if to == (rank + 1) % size else node for to, node in enumerate(nodes)])
        for rank in range(size)
    ]


class _RelayEnd(asyncio.Protocol):
    """One end of a connection. Its data leaves at the other end after the delay."""

    def __init__(self, delay_s: float):
        self._delay_s = delay_s
        self.transport: asyncio.Transport | None = None
        self.other: _RelayEnd | None = None
        self._pending: list[Callable[[asyncio.Transport], None]] = []  # data from before the other end was connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._later(lambda transport: transport.write(data))

    def eof_received(self) -> bool:
        self._later(lambda transport: transport.write_eof())
        return True  # the other direction stays open

    def connection_lost(self, exc: Exception | None) -> None:
        self._later(lambda transport: transport.close())

    def join(self, other: _RelayEnd) -> None:
        """Connect to the other end, and deliver the pending data."""
        self.other = other
        for action in self._pending:
            self._at_other(action)

    def _later(self, action: Callable[[asyncio.Transport], None]) -> None:
        asyncio.get_running_loop().call_later(self._delay_s, self._at_other, action)

    def _at_other(self, action: Callable[[asyncio.Transport], None]) -> None:
        if self.other is None:
            self._pending.append(action)
            return
        transport = self.other.transport
        if transport is not None and not transport.is_closing():
            action(transport)


class _RelayEntry(_RelayEnd):
    """The end that a rank has connected to. It connects to the next rank, which may not listen yet."""

    def __init__(self, delay_s: float, target: str):
        super().__init__(delay_s)
        self._host, _, port = target.rpartition(":")
        self._port = int(port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._task = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        assert self.transport is not None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CONNECT_TIMEOUT_S
        target_end = _RelayEnd(self._delay_s)
        while loop.time() < deadline and not self.transport.is_closing():
            try:
                await loop.create_connection(lambda: target_end, self._host, self._port)
            except OSError:
                await asyncio.sleep(RETRY_DELAY_S)
                continue
            target_end.join(self)
            self.join(target_end)
            return
        self.transport.abort()


async def _relay(delay_s: float) -> None:
    """Read lists of addresses, and answer each with the relay's addresses for them. Exit at the end of the input."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    servers: list[asyncio.Server] = []

    async def listen(target: str) -> str:
        server = await loop.create_server(lambda: _RelayEntry(delay_s, target), "127.0.0.1", 0)
        servers.append(server)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    while line := await reader.readline():
        nodes: list[list[str]] = []
        for node in json.loads(line):  # Python 3.10 has no nested asynchronous comprehensions
            nodes.append([await listen(target) for target in node])
        print(json.dumps(nodes), flush=True)


def main() -> None:
    """Run the relay's process. Its last argument is the delay in seconds."""
    with contextlib.suppress(OSError, AttributeError):  # real-time priority over spinning ranks; needs root on Linux
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    # epoll waits whole milliseconds, select microseconds
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(_relay(float(sys.argv[-1])))
    os._exit(0)  # without cleanup: data in flight has no receiver any more

"""A long cable between local ranks: a relay that hands on every piece of data a fixed time later, in both directions.

Each piece has its own due time, so any amount can be under way at once: it delays, and does not slow down. The relay
is a process of its own, for whoever starts the ring: `detour` gives every rank a ring file in which the next rank's
address is the relay's (MLX's ranks listen at their own address, and connect to the next rank's). It adds 0.1 to 0.2 ms.
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

from kimi_mlx.cluster.ring.launch import rank_command
from kimi_mlx.errors import RingError

AGAIN_S = 0.05
"""Between attempts to reach a rank that does not listen yet."""

GIVE_UP_S = 60.0
"""After which it is not tried any more."""

END_PATIENCE_S = 5.0
"""For the end of the relay once its input is closed."""


@contextlib.contextmanager
def slow_links(delay_ms: float) -> Iterator[Callable[[str], list[str]]]:
    """Start a relay, and yield what makes a ring's file one for each rank (see Cluster.detour).

    Args:
        delay_ms: of each direction.

    Raises:
        RingError: by what is yielded, if the relay has ended.
    """
    command = [*rank_command(__name__), str(delay_ms / 1000)]
    relay = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
    )
    assert relay.stdin is not None
    assert relay.stdout is not None
    sink, source = relay.stdin, relay.stdout

    def detour(file: str) -> list[str]:
        try:
            sink.write(file + "\n")
            return ring_views(json.loads(file), json.loads(source.readline()))
        except (OSError, ValueError) as error:
            raise RingError(
                f"the relay of --link-delay-ms has ended with code {relay.poll()}", hint="try again"
            ) from error

    try:
        yield detour
    finally:
        with contextlib.suppress(OSError):
            sink.close()
        try:
            relay.wait(END_PATIENCE_S)
        except subprocess.TimeoutExpired:
            relay.kill()
            relay.wait()
        source.close()


def ring_views(nodes: Sequence[Sequence[str]], relays: Sequence[Sequence[str]]) -> list[str]:
    """The ring's file of each rank: its own address as it is, the next rank's at the relay.

    Args:
        nodes: addresses of each rank.
        relays: the relay's addresses in front of them.
    """
    size = len(nodes)
    return [
        json.dumps([relays[to] if to == (rank + 1) % size else node for to, node in enumerate(nodes)])
        for rank in range(size)
    ]


class _End(asyncio.Protocol):
    """One end of a connection; what comes in here leaves at the other one after the delay."""

    def __init__(self, delay_s: float):
        self._delay_s = delay_s
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None
        self._early: list[Callable[[asyncio.Transport], None]] = []  # what came before there was another end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._later(lambda transport: transport.write(data))

    def eof_received(self) -> bool:
        self._later(lambda transport: transport.write_eof())
        return True  # the other direction may go on

    def connection_lost(self, exc: Exception | None) -> None:
        self._later(lambda transport: transport.close())

    def join(self, other: _End) -> None:
        """Hand on to another end from now on."""
        self.other = other
        for act in self._early:
            self._at_other(act)

    def _later(self, act: Callable[[asyncio.Transport], None]) -> None:
        asyncio.get_running_loop().call_later(self._delay_s, self._at_other, act)

    def _at_other(self, act: Callable[[asyncio.Transport], None]) -> None:
        if self.other is None:
            self._early.append(act)
            return
        transport = self.other.transport
        if transport is not None and not transport.is_closing():
            act(transport)


class _Entry(_End):
    """The end that a rank has connected to; it connects on to the next rank, which may not listen yet."""

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
        give_up_at = loop.time() + GIVE_UP_S
        exit_ = _End(self._delay_s)
        while loop.time() < give_up_at and not self.transport.is_closing():
            try:
                await loop.create_connection(lambda: exit_, self._host, self._port)
            except OSError:
                await asyncio.sleep(AGAIN_S)
                continue
            exit_.join(self)
            self.join(exit_)
            return
        self.transport.abort()


async def _relay(delay_s: float) -> None:
    """Read lists of addresses, answer each with the relay's own in front of them; ends with its input."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    servers: list[asyncio.Server] = []

    async def listen(target: str) -> str:
        server = await loop.create_server(lambda: _Entry(delay_s, target), "127.0.0.1", 0)
        servers.append(server)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    while line := await reader.readline():
        print(json.dumps([[await listen(each) for each in node] for node in json.loads(line)]), flush=True)


def main() -> None:
    """The relay's process: its last argument is the delay in seconds."""
    with contextlib.suppress(OSError, AttributeError):  # ahead of ranks that spin; needs root, and Linux
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    # epoll waits whole milliseconds, select microseconds
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(_relay(float(sys.argv[-1])))
    os._exit(0)  # what is still under way has nobody to go to

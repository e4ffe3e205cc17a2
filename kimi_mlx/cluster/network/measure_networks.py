"""Measure the networks between hosts: from each rank's host to the next, all pairs of a network at once."""

from __future__ import annotations

import os
import queue
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kimi_mlx.cluster.channel.host_process import HostProcess, terminate_all
from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.hosts.ssh import command_on
from kimi_mlx.cluster.network.links import LinkSpeed, Network, combine_speeds, parse_speed, slow_reasons
from kimi_mlx.cluster.network.measure import command
from kimi_mlx.errors import LinkError

PAIR_LIMIT_S = 6.0
"""Time limit of a pair: connecting, half a second of small messages, and a second of large ones."""

LOGIN_LIMIT_S = 30.0
"""Extra time for two logins, whose start-up files may wait some seconds, and the start of Python."""

END_PATIENCE_S = 1.0
"""Time that processes get to end before they are killed."""


@dataclass(frozen=True)
class Pair:
    """A connection to measure: the host that connects, the host that listens, and the address."""

    client: str
    server: str
    address: str

    def __str__(self) -> str:
        return f"`{self.client}` to `{self.server}` at {self.address}"


@dataclass(frozen=True)
class Link:
    """A network and its measured speed.

    Args:
        network: measured network.
        speed: speed of its slowest pair; None if a pair failed.
        problems: messages about the pairs that failed.
    """

    network: Network
    speed: LinkSpeed | None
    problems: tuple[str, ...] = ()


def ring_pairs(hosts: Sequence[str], network: Network) -> list[Pair]:
    """Return the connections of a ring: each host to the next, the last to the first."""
    next_hosts = [*range(1, len(hosts)), 0]
    return [Pair(hosts[i], hosts[j], network.addresses[j]) for i, j in enumerate(next_hosts)]


def measure_networks(
    hosts: Sequence[str], networks: Sequence[Network], pythons: Mapping[str, str], report: Callable[[str], None]
) -> list[Link]:
    """Measure networks, one after the other. Once a network is fast enough, skip the others of its kind.

    Args:
        hosts: hosts in the order of the networks' addresses.
        networks: networks from `find_common_networks`.
        pythons: host -> path of any Python interpreter there.
        report: callback for progress messages.
    """
    links: list[Link] = []
    fast: set[str] = set()
    for network in networks:
        if network.kind in fast:
            continue
        report(f"measuring {network}")
        link = measure_network(hosts, network, pythons)
        links.append(link)
        if link.speed is not None and not slow_reasons(network, link.speed):
            fast.add(network.kind)
    return links


def measure_network(
    hosts: Sequence[str], network: Network, pythons: Mapping[str, str], limit_s: float = PAIR_LIMIT_S
) -> Link:
    """Measure all pairs of a ring at once, because a ring uses them at once."""
    speeds, problems = measure_pairs(ring_pairs(hosts, network), pythons, limit_s)
    return Link(network, None if problems else combine_speeds(speeds), tuple(problems))


def measure_pairs(
    pairs: Sequence[Pair], pythons: Mapping[str, str], limit_s: float = PAIR_LIMIT_S
) -> tuple[list[LinkSpeed], list[str]]:
    """Measure pairs at once. It leaves no process on any host, even if it fails.

    Returns:
        Speeds of the pairs that worked, and messages about those that failed.
    """
    measurement = _PairMeasurement(pairs, pythons, limit_s)
    try:
        return measurement.run()
    finally:
        measurement.close()


class _PairMeasurement:
    """The processes of a measurement: side 2 n listens for pair n, side 2 n + 1 connects."""

    def __init__(self, pairs: Sequence[Pair], pythons: Mapping[str, str], limit_s: float):
        self._pairs = pairs
        self._pythons = pythons
        self._limit_s = limit_s
        self._secret = secrets.token_hex(16)
        self._messages: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self._processes: dict[int, HostProcess] = {}

    def run(self) -> tuple[list[LinkSpeed], list[str]]:
        for number, pair in enumerate(self._pairs):
            # The server listens while the client logs in, so it needs more time.
            self._start(2 * number, pair.server, "serve", pair.address, 0, self._limit_s + LOGIN_LIMIT_S)
        results: dict[int, LinkSpeed | str] = {}
        end = time.monotonic() + self._limit_s + LOGIN_LIMIT_S
        while len(results) < len(self._pairs):
            try:
                side, message = self._messages.get(timeout=max(end - time.monotonic(), 0))
            except queue.Empty:
                break
            number, is_client = divmod(side, 2)
            if number in results:
                continue
            result = self._handle_message(number, bool(is_client), message)
            if result is not None:
                results[number] = result
        timeout = f"no answer within {self._limit_s + LOGIN_LIMIT_S:.0f} s"
        outcomes = [(pair, results.get(number, timeout)) for number, pair in enumerate(self._pairs)]
        speeds = [outcome for _, outcome in outcomes if isinstance(outcome, LinkSpeed)]
        return speeds, [f"{pair}: {outcome}" for pair, outcome in outcomes if isinstance(outcome, str)]

    def close(self) -> None:
        terminate_all([*self._processes.values()], END_PATIENCE_S)

    def _handle_message(self, number: int, is_client: bool, message: Message | None) -> LinkSpeed | str | None:
        """Return the result of a pair (speed or error), or None if the message does not decide it."""
        pair = self._pairs[number]
        if message is None:
            if not is_client and 2 * number + 1 in self._processes:
                return None  # the client's message has the details
            process = self._processes[2 * number + is_client]
            return f"the measurement on `{pair.client if is_client else pair.server}` {process.describe_exit()}"
        if message["kind"] == "listening":
            port = int(message["port"])
            self._start(2 * number + 1, pair.client, "measure", pair.address, port, self._limit_s)
            return None
        if message["kind"] == "error" and not is_client:
            return None if 2 * number + 1 in self._processes else f"`{pair.server}`: {message['error']}"
        try:
            return parse_speed(message)
        except LinkError as error:
            return error.message

    def _start(self, side: int, host: str, role: str, address: str, port: int, limit_s: float) -> None:
        start = command_on(host, command(self._pythons[host], role, address, port, limit_s))
        preamble = start.data + f"{self._secret}\n".encode()
        self._processes[side] = HostProcess(side, start.command, os.environ, self._deliver, preamble, start.mark)

    def _deliver(self, side: int, message: Message | None) -> None:
        self._messages.put((side, message))

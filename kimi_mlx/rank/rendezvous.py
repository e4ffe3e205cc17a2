"""How a rank joins the others: it names free ports, is told those of all, and connects with `mx.distributed`."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from kimi_mlx.cluster.doctor.payloads import quick_payloads
from kimi_mlx.cluster.ring.backends import backend_variables
from kimi_mlx.cluster.ring.launch import available_processors, processor_of
from kimi_mlx.cluster.ring.link_watch import LinkWatch
from kimi_mlx.cluster.ring.messages import Message
from kimi_mlx.errors import RingError, UsageError
from kimi_mlx.parallel.group import Group, MlxGroup, SingleGroup
from kimi_mlx.rank.channel import Channel
from kimi_mlx.rank.link_test import check


def join(channel: Channel, start: Message) -> Group:
    """Join the ranks that the front has started together; says `listening`, `joined` and `tested`.

    Raises:
        RingError: the others are not found, or an address is not of this host.
    """
    group = join_mlx_group(channel, start)
    return SingleGroup() if group is None else MlxGroup(group)


def join_mlx_group(channel: Channel, start: Message) -> mx.distributed.Group | None:
    """The same as MLX's own group; None for a rank alone."""
    ports = _ports(start["addresses"], start["rank"])
    links = _watch(start)
    port = None if links is None else links.port
    channel.send("listening", pid=os.getpid(), ports=ports, link_port=port)
    ring = channel.next_command()
    pin_to_cpu(start["place"])
    group = None
    if start["size"] > 1:
        try:
            group = connect(ring, start["rank"])
            # the first collective sets up buffers, and shows that all are there
            mx.eval(mx.distributed.all_sum(mx.array([1.0]), group=group))
        except RuntimeError as error:
            raise RingError(f"the others are not found: {error}", rank=start["rank"]) from error
    if links is not None:
        links.start(ring["word"].encode(), _neighbours(ring["links"], start["rank"]))
        channel.links = links
    channel.send("joined")
    channel.send("tested", mismatches=[] if group is None else _test_links(channel, MlxGroup(group)))
    return group


def _test_links(channel: Channel, group: MlxGroup) -> list[dict[str, Any]]:
    """What arrives otherwise than it was sent; the front, which hears of it from all, finds the link."""
    mismatches = check(group, quick_payloads(), 1, channel.report_progress)
    channel.report_progress("idle")
    return mismatches


def join_with_peers(channel: Channel, start: Message) -> mx.distributed.Group:
    """The same for work that one rank alone has none of."""
    group = join_mlx_group(channel, start)
    if group is None:
        raise UsageError("there is only one rank", hint="name two hosts or more")
    return group


def free_port(address: str) -> int:
    """A port of this address that nobody listens on now; another process may still take it."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def pin_to_cpu(place: Sequence[int]) -> None:
    """Keep this process on a processor of its own: which of the ranks on this host it is, and of how many."""
    number, count = place
    if (processor := processor_of(number, count, available_processors())) is not None:
        os.sched_setaffinity(0, {processor})


def connect(ring: Mapping[str, Any], rank: int) -> mx.distributed.Group:
    """MLX's group; the file that it wants is there only while it connects.

    Args:
        ring: `file`, `backend` and `coordinator`, as the front tells them.
        rank: our number.

    Raises:
        RuntimeError: MLX's, if the others are not found.
    """
    handle, name = tempfile.mkstemp(suffix=".json")  # in the guard's folder, which goes with it
    with os.fdopen(handle, "w") as file:
        file.write(ring["file"])
    os.environ.update(backend_variables(ring["backend"], rank, name, ring["coordinator"]))
    try:
        return mx.distributed.init(strict=True, backend="ring" if ring["backend"] == "ring" else "jaccl")
    finally:
        os.unlink(name)


def _ports(addresses: Sequence[str], rank: int) -> list[int]:
    ports: list[int] = []
    for address in addresses:
        try:
            ports.append(free_port(address))
        except OSError as error:
            raise RingError(
                f"rank {rank} cannot listen on {address}: {error.strerror}",
                hint="mend the address in the hostfile, or let it be found: `kimi-mlx doctor --hosts ... --save FILE`",
                rank=rank,
            ) from error
    return ports


def _watch(start: Message) -> LinkWatch | None:
    """Our end of the watch over the links, if there are any."""
    addresses = start["addresses"]
    return LinkWatch(addresses[0]) if addresses and not addresses[0].startswith("127.") else None


def _neighbours(links: Sequence[Sequence[Any] | None], rank: int) -> dict[int, tuple[str, int]]:
    size = len(links)
    beside = {(rank + 1) % size, (rank - 1) % size}
    return {peer: (link[0], link[1]) for peer in beside if (link := links[peer]) is not None}

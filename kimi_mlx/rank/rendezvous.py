"""Connect a rank to the others: report free ports, receive the ports of all ranks, call `mx.distributed.init`."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.doctor.payloads import quick_payloads
from kimi_mlx.cluster.hosts.launch import available_cpus, cpu_for_rank
from kimi_mlx.cluster.ring.backends import backend_variables
from kimi_mlx.cluster.ring.guard import temporary_files_error
from kimi_mlx.cluster.ring.link_watch import LinkWatch
from kimi_mlx.errors import RingError, UsageError
from kimi_mlx.parallel.group import Group, MlxGroup, SingleGroup
from kimi_mlx.parallel.ring_sockets import find_ring_sockets
from kimi_mlx.rank.channel import Channel
from kimi_mlx.rank.link_test import check_links


def join_group(channel: Channel, start: Message) -> Group:
    """Join the ranks that the front has started; send `listening`, `joined` and `tested`.

    Raises:
        RingError: cannot connect to the other ranks, or an address does not belong to this host.
    """
    group = join_mlx_group(channel, start)
    return SingleGroup() if group is None else MlxGroup(group)


def join_mlx_group(channel: Channel, start: Message) -> mx.distributed.Group | None:
    """Join as `join_group` does; return MLX's own group, or None for a single rank."""
    ports = _ports(start["addresses"], start["rank"])
    links = _open_link_watch(start)
    link_port = None if links is None else links.port
    channel.send("listening", pid=os.getpid(), ports=ports, link_port=link_port)
    ring = channel.next_command()
    pin_to_cpu(start["cpu_slot"])
    group = None
    if start["size"] > 1:
        try:
            group = init_group(ring, start["rank"])
            # The first collective allocates buffers, and shows that all ranks have connected.
            mx.eval(mx.distributed.all_sum(mx.array([1.0]), group=group))
        except RuntimeError as error:
            raise RingError(f"cannot connect to the other ranks: {error}", rank=start["rank"]) from error
    channel.enable_graceful_exit([] if group is None else _connections(ring, start["rank"]))
    if links is not None:
        links.start(ring["ring_token"].encode(), _neighbour_addresses(ring["links"], start["rank"]))
        channel.links = links
    channel.send("joined")
    channel.send("tested", mismatches=[] if group is None else _test_links(channel, MlxGroup(group)))
    return group


def _test_links(channel: Channel, group: MlxGroup) -> list[dict[str, Any]]:
    """Return the corrupted payloads. The front compares the reports of all ranks to find the faulty link."""
    mismatches = check_links(group, quick_payloads(), 1, channel.report_progress)
    channel.report_progress("idle")
    return mismatches


def join_with_peers(channel: Channel, start: Message) -> mx.distributed.Group:
    """Join as `join_mlx_group` does, for work that needs two ranks or more."""
    group = join_mlx_group(channel, start)
    if group is None:
        raise UsageError("this needs two ranks or more, but there is one", hint="name two hosts or more")
    return group


def free_port(address: str) -> int:
    """Return a free port of this address. Another process may still take it before it is used."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def pin_to_cpu(cpu_slot: Sequence[int]) -> None:
    """Keep this process on its own processor.

    Args:
        cpu_slot: index of this rank among the ranks of its host, and their number.
    """
    number, count = cpu_slot
    if (processor := cpu_for_rank(number, count, available_cpus())) is not None:
        os.sched_setaffinity(0, {processor})


def init_group(ring: Mapping[str, Any], rank: int) -> mx.distributed.Group:
    """Return MLX's group. MLX's hostfile exists only while it connects.

    Args:
        ring: message of the front with `file`, `backend` and `coordinator`.
        rank: rank of this process.

    Raises:
        RingError: the hostfile cannot be written.
        RuntimeError: MLX cannot connect to the other ranks.
    """
    try:
        handle, name = tempfile.mkstemp(suffix=".json")  # TMPDIR is the guard's folder, which is removed with it
        with os.fdopen(handle, "w") as file:
            file.write(ring["file"])
    except OSError as error:
        raise temporary_files_error(error) from error
    os.environ.update(backend_variables(ring["backend"], rank, name, ring["coordinator"]))
    try:
        return mx.distributed.init(strict=True, backend="ring" if ring["backend"] == "ring" else "jaccl")
    finally:
        os.unlink(name)


def _connections(ring: Mapping[str, Any], rank: int) -> list[int]:
    """Return the sockets of MLX's ring; none for JACCL, whose collectives cannot be aborted."""
    return find_ring_sockets(json.loads(ring["file"]), rank) if ring["backend"] == "ring" else []


def _ports(addresses: Sequence[str], rank: int) -> list[int]:
    ports: list[int] = []
    for address in addresses:
        try:
            ports.append(free_port(address))
        except OSError as error:
            raise RingError(
                f"rank {rank} cannot listen on {address}: {error.strerror}",
                hint="correct the address in the hostfile, or run `kimi-mlx doctor --hosts ... --save FILE` to find it",
                rank=rank,
            ) from error
    return ports


def _open_link_watch(start: Message) -> LinkWatch | None:
    """Return the watch over the links to the neighbours; None on a single host."""
    addresses = start["addresses"]
    return LinkWatch(addresses[0]) if addresses and not addresses[0].startswith("127.") else None


def _neighbour_addresses(links: Sequence[Sequence[Any] | None], rank: int) -> dict[int, tuple[str, int]]:
    size = len(links)
    peers = {(rank + 1) % size, (rank - 1) % size}
    return {peer: (link[0], link[1]) for peer in peers if (link := links[peer]) is not None}

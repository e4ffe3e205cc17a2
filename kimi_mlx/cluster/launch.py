"""How a rank is started: its command, environment and processor. Pure, by MLX's contract of environment variables.

Source: https://ml-explore.github.io/mlx/build/html/usage/distributed.html (ring backend, hostfile, MLX_RANK).
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack


def rank_command(module: str, python: str = sys.executable) -> list[str]:
    """The command of a rank; everything else reaches it through the environment and its standard input."""
    # Not `-m`, which would import from the folder that the user happens to stand in before anything else.
    code = f"import sys; sys.path[:] = filter(None, sys.path); from {module} import main; main()"
    return [python, "-u", "-c", code]


def rank_environment(base: Mapping[str, str], rank: int, hostfile: str) -> dict[str, str]:
    """The environment of a rank of a ring: `base` without another ring's variables, and MLX's own two."""
    return {**without_ring(base), "MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile}


RING_VARIABLES = frozenset(
    {"MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_JACCL_COORDINATOR", "MLX_IBV_DEVICES", "MLX_JACCL_RING"}
    # JACCL's own names, which it reads before MLX's
    | {"JACCL_RANK", "JACCL_COORDINATOR", "JACCL_IBV_DEVICES", "JACCL_RING"}
)
"""What makes a process a rank of a ring; only the launcher sets them."""


def without_ring(base: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables of another ring."""
    return {name: value for name, value in base.items() if name not in RING_VARIABLES}


def ring_hostfile(addresses: Sequence[str]) -> str:
    """What MLX_HOSTFILE's file holds: for each rank the list of addresses on which it listens."""
    return json.dumps([[address] for address in addresses])


def free_local_addresses(count: int) -> list[str]:
    """Loopback addresses with ports that nobody listens on now; another process may still take one."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def processor_of(rank: int, world_size: int, available: Sequence[int] | None) -> int | None:
    """The processor on which a local rank should stay: ring threads spin, and ten times slower if they are moved.

    None for a rank alone, if there are fewer processors than ranks, or on a system that does not pin.
    """
    if available is None or not 1 < world_size <= len(available):
        return None
    return sorted(available)[rank]


def available_processors() -> list[int] | None:
    """Processors that this process may use, where the system tells (Linux)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None

"""What `mlx.launch` gives to the processes of a ring: a hostfile with free ports on loopback, and two variables."""

from __future__ import annotations

import json
import random
import socket

PORTS = range(12000, 32000)
"""Below those that a system gives to whoever asks for any: nobody takes one before the ring does."""


def loopback_hostfile(size: int) -> str:
    """The text of the file."""
    ports = filter(_is_free, random.SystemRandom().sample(PORTS, 100))
    return json.dumps([[f"127.0.0.1:{next(ports)}"] for _ in range(size)])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def ring_variables(rank: int, hostfile: str) -> dict[str, str]:
    """The environment of a rank."""
    return {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile}

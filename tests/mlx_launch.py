"""The environment of ranks under `mlx.launch`: a hostfile with free loopback ports, and two variables."""

from __future__ import annotations

import json
import random
import socket

PORTS = range(12000, 32000)
"""Ports below the ephemeral range, so that no other process gets one by chance before the ring uses it."""


def loopback_hostfile(size: int) -> str:
    """Return the text of a hostfile."""
    ports = filter(_is_free, random.SystemRandom().sample(PORTS, 100))
    return json.dumps([[f"127.0.0.1:{next(ports)}"] for _ in range(size)])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def ring_variables(rank: int, hostfile: str) -> dict[str, str]:
    """Return the environment variables of a rank."""
    return {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile}

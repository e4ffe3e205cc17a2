"""What `mlx.launch` gives to the processes of a ring: a hostfile with free ports on loopback, and two variables."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack


def loopback_hostfile(size: int) -> str:
    """The text of the file; another process may still take a port."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(size)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return json.dumps([[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets])


def ring_variables(rank: int, hostfile: str) -> dict[str, str]:
    """The environment of a rank."""
    return {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile}

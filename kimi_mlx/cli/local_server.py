"""What `kimi-mlx serve` tells this user's other processes, and the servers that hold the memory of hosts."""

from __future__ import annotations

import os
import time
from collections.abc import Collection

from kimi_mlx.cli.open_model import OpenedModel
from kimi_mlx.client.local_servers import LocalServer, find_servers
from kimi_mlx.session.model_status import model_status
from kimi_mlx.store.model_ref import ModelRef


def local_server(target: ModelRef, opened: OpenedModel, url: str, *, needs_key: bool) -> LocalServer:
    """Return the description of a server of this process.

    Args:
        target: the model.
        opened: the loaded model.
        url: address for programs on this machine.
        needs_key: whether requests need a key.
    """
    cluster = opened.deployment.cluster
    status = model_status(opened.deployment, opened.session)
    return LocalServer(
        url=url,
        model=target.name,
        source=source_of(target),
        weights_bytes=sum(rank.weights_bytes for rank in status.ranks),
        hosts=() if cluster is None else tuple(name for name in cluster.names if name != "localhost"),
        needs_key=needs_key,
        pid=os.getpid(),
        started_at=time.time(),
    )


def source_of(target: ModelRef) -> str:
    """Return the repository of a model, or the absolute path of its folder."""
    return str(target.folder.resolve()) if target.folder is not None else str(target.repository)


def servers_on(hosts: Collection[str]) -> list[LocalServer]:
    """Return this user's servers that hold a model on one of these hosts."""
    return [server for server in find_servers() if set(server.hosts) & set(hosts)]

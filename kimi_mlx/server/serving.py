"""The server's process side: its socket, its loop, its end."""

from __future__ import annotations

import errno
import socket

import uvicorn
from starlette.types import ASGIApp

from kimi_mlx.errors import UsageError
from kimi_mlx.server.protocol import PatientProtocol
from kimi_mlx.server.service import Service

KEEP_ALIVE_S = 75
END_LIMIT_S = 10
BACKLOG = 512


def bind(host: str, port: int) -> socket.socket:
    """Take an address, before anything is loaded; port 0 takes any.

    Raises:
        UsageError: it is taken, or not ours.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"`{host}` is no address: {error.strerror}", hint="use --host 127.0.0.1") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of `{host}` is taken by another program"
            raise UsageError(message, hint=f"choose another one: --port {port + 1}") from error
        message = f"the server cannot have port {port} of `{host}`: {error.strerror}"
        raise UsageError(message, hint="use --host 127.0.0.1 and a --port above 1023") from error
    return bound


class Server(uvicorn.Server):
    """uvicorn, which ends the answers before it waits for their ends.

    Args:
        app: the application.
        service: that answers.
    """

    def __init__(self, app: ASGIApp, service: Service):
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=END_LIMIT_S,
        )
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in order."""
        self._service.close()
        await super().shutdown(sockets)

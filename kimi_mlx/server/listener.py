"""The address that a server listens on."""

from __future__ import annotations

import errno
import socket

from kimi_mlx.errors import UsageError


class Listener:
    """Takes an address; whoever calls before the server runs is refused.

    Args:
        host: a name or an address.
        port: 0 takes any.

    Raises:
        UsageError: it is taken, or not ours.
    """

    def __init__(self, host: str, port: int):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise UsageError(f"`{host}` is no address: {error.strerror}", hint="use --host 127.0.0.1") from error
        self.host = host
        self.socket = socket.socket(family, kind, protocol)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind(address)
        except OSError as error:
            self.socket.close()
            if error.errno == errno.EADDRINUSE:
                message, hint = f"port {port} of `{host}` is taken by another program", f"--port {port + 1}"
                raise UsageError(message, hint=f"choose another one: {hint}, or --port 0 for any") from error
            message = f"the server cannot have port {port} of `{host}`: {error.strerror}"
            raise UsageError(message, hint="use --host 127.0.0.1 and a --port above 1023") from error

    @property
    def port(self) -> int:
        """The one that was taken."""
        return self.socket.getsockname()[1]

    @property
    def url(self) -> str:
        """Where programs on this machine find it."""
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}"

    def close(self) -> None:
        """Give it back."""
        self.socket.close()

"""The socket that the server listens on."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from ipaddress import ip_address

from kimi_mlx.errors import UsageError

DOCUMENTATION_ADDRESSES: dict[int, str] = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses reserved for documentation, which no machine has (RFC 5737, RFC 3849)."""

BACKLOG = 2048
"""Maximum number of connections that wait to be accepted, as in uvicorn."""


class ServerSocket:
    """A bound socket; connections are refused until `listen` is called.

    Args:
        host: host name or address to bind.
        port: port; 0 takes any free one.

    Raises:
        UsageError: the address is in use, or does not belong to this machine.
    """

    def __init__(self, host: str, port: int):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            message = f"cannot resolve `{host}`: {error.strerror}"
            raise UsageError(message, hint="use --host 127.0.0.1") from error
        self.host = host
        self.socket = socket.socket(family, kind, protocol)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind(address)
        except OSError as error:
            self.socket.close()
            raise _bind_error(error, host, port) from error

    def listen(self) -> None:
        """Accept connections into the backlog from now on.

        Raises:
            UsageError: another program already listens. Several programs can bind one address until one listens.
        """
        try:
            self.socket.listen(BACKLOG)
        except OSError as error:
            raise _bind_error(error, self.host, self.port) from error

    @property
    def port(self) -> int:
        """Port that the socket is bound to."""
        return self.socket.getsockname()[1]

    @property
    def url(self) -> str:
        """URL for programs on this machine."""
        return self._url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host))

    @property
    def other_urls(self) -> list[str]:
        """URLs for other machines, by host name and by address, if the socket is bound to all addresses."""
        if self.host not in ("0.0.0.0", "::"):
            return []
        addresses = _own_addresses(self.socket.family)
        return [self._url(name) for name in (socket.gethostname(), *addresses)]

    def _url(self, name: str) -> str:
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}"

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def _bind_error(error: OSError, host: str, port: int) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        message = f"port {port} of `{host}` is in use by another program"
        return UsageError(message, hint=f"choose another one: --port {port + 1}, or --port 0 for any")
    message = f"cannot listen on port {port} of `{host}`: {error.strerror}"
    return UsageError(message, hint="use --host 127.0.0.1 and a --port above 1023")


def _own_addresses(family: int) -> list[str]:
    """Return this machine's addresses: that of its default route, and those of its host name."""
    addresses: list[str] = []
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((DOCUMENTATION_ADDRESSES[family], 9))  # chooses a route; nothing is sent
        addresses.append(probe.getsockname()[0])
    with suppress(OSError):
        addresses += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, family)]
    unique = dict.fromkeys(addresses)
    return [address for address in unique if not ip_address(address.partition("%")[0]).is_loopback]

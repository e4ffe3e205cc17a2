"""The address that a server listens on."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from ipaddress import ip_address

from kimi_mlx.errors import UsageError

ELSEWHERE: dict[int, str] = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses of nobody (RFC 5737, RFC 3849)."""


BACKLOG = 2048
"""Callers that may wait, as uvicorn has it."""


class ServerSocket:
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
            raise _refusal(error, host, port) from error

    def listen(self) -> None:
        """Let callers wait from now on.

        Raises:
            UsageError: another program was faster: as long as nobody listens, two may have the same address.
        """
        try:
            self.socket.listen(BACKLOG)
        except OSError as error:
            raise _refusal(error, self.host, self.port) from error

    @property
    def port(self) -> int:
        """The one that was taken."""
        return self.socket.getsockname()[1]

    @property
    def url(self) -> str:
        """Where programs on this machine find it."""
        return self._url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host))

    @property
    def other_urls(self) -> list[str]:
        """Where other machines find it, if it listens on all addresses: under this machine's name, and by number."""
        if self.host not in ("0.0.0.0", "::"):
            return []
        numbers = _addresses(self.socket.family)
        return [self._url(name) for name in (socket.gethostname(), *numbers)]

    def _url(self, name: str) -> str:
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}"

    def close(self) -> None:
        """Give it back."""
        self.socket.close()


def _refusal(error: OSError, host: str, port: int) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        message, hint = f"port {port} of `{host}` is taken by another program", f"--port {port + 1}"
        return UsageError(message, hint=f"choose another one: {hint}, or --port 0 for any")
    message = f"the server cannot have port {port} of `{host}`: {error.strerror}"
    return UsageError(message, hint="use --host 127.0.0.1 and a --port above 1023")


def _addresses(family: int) -> list[str]:
    """This machine's own, as its name and its route to others tell them."""
    found: list[str] = []
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((ELSEWHERE[family], 9))  # chooses a route; nothing is sent
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += [str(each[4][0]) for each in socket.getaddrinfo(socket.gethostname(), None, family)]
    return [each for each in dict.fromkeys(found) if not ip_address(each.partition("%")[0]).is_loopback]

"""Access control: API keys, and protection from web pages that send requests through a visitor's browser."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kimi_mlx.errors import UsageError
from kimi_mlx.server.errors import ApiError

CLIENT_KEY = "kimi_mlx.client"
"""Key of a scope's client: the number of its API key if the server has keys, else its address. Clients take turns."""

API_KEY = "kimi_mlx.api_key"
"""Key of a scope's index of the API key; None if the server has no keys, or the path needs none."""

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Security:
    """Access rules.

    Args:
        host: host name or address that the server is bound to.
        keys: API keys; if there are none, no key is needed.
        allowed_hosts: additional host names of the server.
        origins: origins whose pages may send requests from a browser; `*` allows all.

    Raises:
        UsageError: an origin is malformed.
    """

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    allowed_hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            check_origin_format(origin)

    def check_host(self, header: str | None) -> None:
        """Refuse a host name that is not the server's: it may be a web page's name that resolves to this machine.

        Raises:
            ApiError: 403.
        """
        name = None if header is None else host_name(header)
        if name is None or not self._is_own(name):
            message = f"the host name `{header or ''}` is not allowed"
            hint = "start the server with --allow-host NAME to allow it"
            raise ApiError(403, message, "host_not_allowed", hint=hint)

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """Refuse requests from pages of other sites.

        Raises:
            ApiError: 403.
        """
        if origin is None or "*" in self.origins or origin in self.origins:
            return
        if host is None or origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            message = f"the origin `{origin}` is not allowed"
            hint = "start the server with --cors-origin ORIGIN to allow it"
            raise ApiError(403, message, "origin_not_allowed", hint=hint)

    def check_key(self, headers: Headers) -> int | None:
        """Refuse requests without a valid key. The comparison takes the same time for every key.

        Returns:
            The index of the key; None if the server has no keys.

        Raises:
            ApiError: 401.
        """
        if not self.keys:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # compare all keys, so that the time does not reveal which one matched
        matches = [hmac.compare_digest(key.encode(), valid.encode()) for valid in self.keys]
        if not sum(matches):
            message = "the API key is wrong" if key else "an API key is required: `Authorization: Bearer KEY`"
            raise ApiError(401, message, "invalid_api_key")
        return matches.index(True)

    def _is_own(self, name: str) -> bool:
        if name in LOOPBACK_NAMES or name == self.host.lower() or name in {host.lower() for host in self.allowed_hosts}:
            return True
        if is_loopback(self.host):
            return False
        own = socket.gethostname().lower()
        # a literal address is safe: no page can be served under an address of this machine
        return is_address(name) or name in (own, f"{own.removesuffix('.local')}.local")


class AuthMiddleware:
    """Checks the host, the origin and the key of every request.

    Args:
        app: wrapped application.
        security: access rules.
        public_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, security: Security, public_paths: Collection[str]):
        self._app, self._security, self._public_paths = app, security, public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request, and pass it on."""
        headers = Headers(scope=scope)
        self._security.check_host(headers.get("host"))
        self._security.check_origin(headers.get("origin"), headers.get("host"))
        client = (scope.get("client") or ("",))[0]
        key = None
        if scope["path"] not in self._public_paths:
            key = self._security.check_key(headers)
            client = client if key is None else f"key {key}"
        scope[CLIENT_KEY], scope[API_KEY] = client, key
        await self._app(scope, receive, send)


def check_origin_format(origin: str) -> None:
    """Refuse a string that a browser never sends as an origin.

    Raises:
        UsageError: the origin is not a scheme, a name and an optional port.
    """
    parts = urlsplit(origin if "//" in origin else f"https://{origin}")
    suggestion = f"{parts.scheme}://{parts.netloc or 'example.org'}".lower()
    if origin != "*" and origin != suggestion:
        message = f"`{origin}` is not an origin (scheme, name and optional port)"
        raise UsageError(message, hint=f"write `{suggestion}`")


def host_name(header: str) -> str | None:
    """Return the name in a Host header in lower case, without port and brackets; None if the header is malformed."""
    try:
        parts = urlsplit(f"//{header}")
        parts.port  # noqa: B018 - raises
    except ValueError:
        return None
    return None if parts.path or parts.username is not None or parts.query else parts.hostname


def is_address(name: str) -> bool:
    """Return whether a host name is a literal address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be reached from this machine only."""
    if host == "localhost":
        return True
    return is_address(host) and ipaddress.ip_address(host).is_loopback

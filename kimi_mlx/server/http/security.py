"""Who may ask: keys, and checks against pages in a browser that would ask in their visitor's name."""

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

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/health"})
"""What needs no key: it tells nothing that a connection does not."""


@dataclass(frozen=True)
class Security:
    """Who may ask.

    Args:
        host: the address that the server is bound to.
        keys: that open it; none: everybody may.
        allowed_hosts: further names that it may be called by.
        origins: pages that may ask from a browser; `*` is all of them.

    Raises:
        UsageError: an origin is none.
    """

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    allowed_hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            check_is_origin(origin)

    def check_host(self, header: str | None) -> None:
        """Refuse a name that is not ours: a foreign page whose name was pointed at this machine.

        Raises:
            ApiError: 403.
        """
        name = None if header is None else host_name(header)
        if name is None or not self._is_own(name):
            raise ApiError(
                403,
                f"the server is not called `{header or ''}`; start it with --allow-host to give it that name",
                "host_not_allowed",
            )

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """Refuse pages of other sites.

        Raises:
            ApiError: 403.
        """
        if origin is None or "*" in self.origins or origin in self.origins:
            return
        if host is None or origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise ApiError(
                403,
                f"pages of `{origin}` may not ask; start the server with --cors-origin to let them",
                "origin_not_allowed",
            )

    def check_key(self, headers: Headers) -> None:
        """Refuse who has no key. The comparison takes as long for a wrong one as for a right one.

        Raises:
            ApiError: 401.
        """
        if not self.keys:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # all of them are compared, so that the time tells nothing of which one
        if not sum([hmac.compare_digest(given.encode(), key.encode()) for key in self.keys]):
            what = "the API key is wrong" if given else "an API key is needed: `Authorization: Bearer KEY`"
            raise ApiError(401, what, "invalid_api_key")

    def _is_own(self, name: str) -> bool:
        if name in LOOPBACK_NAMES or name == self.host.lower() or name in {each.lower() for each in self.allowed_hosts}:
            return True
        if is_loopback(self.host):
            return False
        own = socket.gethostname().lower()
        # no page can be served under a bare address of ours, so that one is safe
        return is_address(name) or name in (own, f"{own.removesuffix('.local')}.local")


class AuthMiddleware:
    """Checks every request of HTTP before anything else is done with it."""

    def __init__(self, app: ASGIApp, security: Security):
        self._app, self._security = app, security

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, and pass on."""
        headers = Headers(scope=scope)
        self._security.check_host(headers.get("host"))
        self._security.check_origin(headers.get("origin"), headers.get("host"))
        if scope["path"] not in OPEN_PATHS:
            self._security.check_key(headers)
        await self._app(scope, receive, send)


def check_is_origin(origin: str) -> None:
    """Refuse what no browser sends as an origin.

    Raises:
        UsageError: it is more, or less, than a scheme, a name and perhaps a port.
    """
    parts = urlsplit(origin if "//" in origin else f"https://{origin}")
    likely = f"{parts.scheme}://{parts.netloc or 'example.org'}".lower()
    if origin != "*" and origin != likely:
        raise UsageError(f"`{origin}` is no origin of pages: scheme, name and port", hint=f"write `{likely}`")


def host_name(header: str) -> str | None:
    """The name in a Host header, without the port and brackets, in small letters; None if it is none."""
    try:
        parts = urlsplit(f"//{header}")
        parts.port  # noqa: B018 - raises
    except ValueError:
        return None
    return None if parts.path or parts.username is not None or parts.query else parts.hostname


def is_address(name: str) -> bool:
    """Whether it is a literal address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    return is_address(host) and ipaddress.ip_address(host).is_loopback

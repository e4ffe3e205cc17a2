"""Addresses of servers, as users type them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

import httpx2

from kimi_mlx.errors import UsageError

DEFAULT_PORT = 8080
"""Port of `kimi-mlx serve`, for an address that is a host name alone."""

SCHEME = re.compile(r"(?i)[a-z][a-z0-9+.-]*://")
VERSION = re.compile(r"v\d+[a-z0-9]*")
"""Part of a path that is the version of an API, such as `v1` or `v1beta`."""

PORT = re.compile(r":?[0-9]{1,5}")
"""A port alone, of this machine."""

ENDPOINTS = ("/chat/completions", "/models", "/completions", "/responses", "/messages")
"""Ends of paths that users copy from examples; they are not part of the address."""

ADDRESS_HINT = "write it like `http://mac-a:8080`"


@dataclass(frozen=True)
class ServerAddress:
    """Address of an API that is compatible with OpenAI's.

    Args:
        url: address for people, without the version of the API.
        base: URL that paths such as `/chat/completions` are appended to; it has no slash at its end.
        is_local_network: whether the host is this machine or in its network, so that no proxy is used.
    """

    url: str
    base: str
    is_local_network: bool


def parse_address(text: str) -> ServerAddress:
    """Return the address of a server.

    Args:
        text: URL with or without `/v1`, `host:port`, a host alone (with our own default port), an IPv6 address, or a
            port of this machine.

    Raises:
        UsageError: the text is not an address, or it has a user name, a query or another scheme than http and https.
    """
    text = text.strip()
    try:
        url = httpx2.URL(text if SCHEME.match(text) else f"http://{_with_port(text)}")
        is_port = url.port is None or 0 < url.port < 2**16
    except (httpx2.InvalidURL, ValueError):
        raise _invalid(text) from None
    if not url.host or not is_port or url.scheme not in ("http", "https") or re.search(r"\s", text):
        raise _invalid(text)
    if url.userinfo:
        raise UsageError("an address cannot contain a user name or a key", hint="use `--api-key-file FILE`")
    if url.query or url.fragment:
        raise _invalid(text)
    path = url.path.rstrip("/")
    for endpoint in ENDPOINTS:
        path = path.removesuffix(endpoint)
    root = f"{url.scheme}://{url.netloc.decode()}"
    if not any(VERSION.fullmatch(part) for part in path.split("/")):
        path += "/v1"
    return ServerAddress(root + path.removesuffix("/v1"), root + path, _is_local_network(url.host))


def _with_port(text: str) -> str:
    """Return an address without a scheme, with the default port if it has none."""
    host, slash, path = text.partition("/")
    if PORT.fullmatch(host):
        host = f"127.0.0.1:{host.removeprefix(':')}"
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"  # a bare IPv6 address
    has_port = re.search(r"(?<!:):\d+$", host.rpartition("]")[2] if host.startswith("[") else host)
    return (host if has_port else f"{host}:{DEFAULT_PORT}") + slash + path


def _is_local_network(host: str) -> bool:
    """Return whether a host is this machine or a name or address of its network."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "." not in host or host.lower().endswith((".local", ".lan", ".internal", ".home.arpa", ".ts.net"))
    return address.is_private or address.is_loopback or address.is_link_local


def _invalid(text: str) -> UsageError:
    return UsageError(f"`{text:.200}` is not the address of a server", hint=ADDRESS_HINT)

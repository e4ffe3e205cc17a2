"""Fetch images and videos that a request names by URL, from hosts that the operator has allowed.

A URL makes this server send a request on behalf of a client. So that it never reaches machines that the client cannot
reach itself, it connects only to allowed hosts, and only to public addresses. A host name is resolved once, and the
connection goes to the address that was checked. The same holds for each redirect. Proxies, cookies and passwords are
not used.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import cached_property
from ssl import SSLContext

import anyio
import anyio.to_thread
import httpx2

from kimi_mlx.errors import UsageError
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.message_content import RemoteUrl
from kimi_mlx.server.public_addresses import Resolver, is_public_address, resolve_host
from kimi_mlx.units import format_bytes

LIMIT_S = 20.0
"""Time limit for all URLs of a request together."""

MAX_REDIRECTS = 3

NUM_THREADS = 4
"""Maximum number of requests whose URLs are fetched at once."""

NUM_CONNECTIONS = 4
"""Maximum number of connections for the URLs of one request."""

HOST = re.compile(r"[a-z0-9._-]+|\[[a-f0-9.:]+\]")
PORTS = {"http": 80, "https": 443}
REDIRECTS = frozenset({301, 302, 303, 307, 308})
REQUEST_HEADERS = {"accept": "image/*,video/*", "accept-encoding": "identity", "user-agent": "kimi-mlx"}
SEND_DATA = "send it as a data URL, `data:image/png;base64,...`"


def normalize_host(text: str) -> str:
    """Return an allowed host as `name` or `name:port`, in the form in which hosts of URLs are compared with it.

    Raises:
        UsageError: the text is not a host name or address with an optional port.
    """
    try:
        url = httpx2.URL(f"//{text}")
        is_port = url.port is None or 0 < url.port < 2**16
        if HOST.fullmatch(_name(url)) and is_port and not url.userinfo and not set(text) & set("/?#"):
            return _name(url) if url.port is None else f"{_name(url)}:{url.port}"
    except httpx2.InvalidURL:
        pass
    message = f"`{text}` is not a host (a name or address, with `:PORT` unless it is the usual one)"
    raise UsageError(message, hint="use `--allow-image-urls` with names of hosts, such as `upload.wikimedia.org`")


class ImageFetcher:
    """Fetches URLs. Its methods may be called for several requests at once.

    Args:
        hosts: allowed hosts from `normalize_host`. A host without a port is allowed with the usual ports of HTTP.
        max_bytes: size limit of all images of a request together.
        resolve: function that returns the addresses of a host name.
        is_public: function that returns whether the server may connect to an address.
    """

    def __init__(
        self,
        hosts: Collection[str] = (),
        max_bytes: int = 0,
        resolve: Resolver = resolve_host,
        is_public: Callable[[str], bool] = is_public_address,
    ):
        self._hosts, self._max_bytes = frozenset(hosts), max_bytes
        self._resolve, self._is_public = resolve, is_public

    async def fetch(self, urls: Sequence[RemoteUrl]) -> dict[str, bytes]:
        """Return the content of each URL of a request. A URL that appears twice is fetched once.

        Raises:
            ApiError: 400, a URL is not allowed or cannot be fetched.
        """
        unique = {remote.url: remote for remote in urls}
        for remote in unique.values():
            self._check(remote.url, remote.place)
        try:
            with anyio.fail_after(LIMIT_S):
                return await anyio.to_thread.run_sync(
                    anyio.run, self._fetch_all, list(unique.values()), limiter=self._threads, abandon_on_cancel=True
                )
        except TimeoutError as error:
            place = next(iter(unique.values())).place
            raise _refusal(place, f"fetching the images of this request takes more than {LIMIT_S:.0f} s") from error

    def _check(self, text: str, place: str) -> httpx2.URL:
        """Return a URL that may be fetched; its addresses have not been checked yet."""
        try:
            url = httpx2.URL(text)
        except httpx2.InvalidURL as error:
            raise _refusal(place, f"this is not a valid URL; {SEND_DATA}") from error
        if not url.scheme:
            raise _refusal(place, f"this is not a URL; {SEND_DATA}")
        if url.scheme not in PORTS:
            raise _refusal(place, f"`{url.scheme:.20}` URLs are not supported; {SEND_DATA}")
        if not url.host or url.userinfo:
            raise _refusal(place, f"a URL must have a host, and no user name or password; {SEND_DATA}")
        name, port = _name(url), url.port or PORTS[url.scheme]
        if f"{name}:{port}" not in self._hosts and (url.port is not None or name not in self._hosts):
            subject = f"from `{url.netloc.decode():.100}`" if self._hosts else "from URLs"
            hint = "--allow-image-urls HOST allows a host"
            raise _refusal(place, f"this server does not fetch images {subject}; {SEND_DATA}", hint)
        return url

    async def _fetch_all(self, urls: Sequence[RemoteUrl]) -> dict[str, bytes]:
        """Fetch URLs concurrently; runs in a thread with an event loop of its own."""
        contents: dict[str, bytes] = {}
        errors: list[ApiError] = []
        semaphore = anyio.Semaphore(NUM_CONNECTIONS)
        budget = _Budget(self._max_bytes)

        async def fetch(remote: RemoteUrl) -> None:
            async with semaphore:
                try:
                    contents[remote.url] = await self._fetch_one(remote, budget)
                except ApiError as error:
                    errors.append(error)
                    group.cancel_scope.cancel()

        with anyio.fail_after(LIMIT_S):  # also if nobody waits for the thread any more
            async with anyio.create_task_group() as group:
                for remote in urls:
                    group.start_soon(fetch, remote)
        if errors:
            raise errors[0]
        return {remote.url: contents[remote.url] for remote in urls}

    async def _fetch_one(self, remote: RemoteUrl, budget: _Budget) -> bytes:
        text = remote.url
        for _ in range(MAX_REDIRECTS + 1):
            url = self._check(text, remote.place)
            async with self._response(url, remote.place) as response:
                if response.status_code not in REDIRECTS or "location" not in response.headers:
                    return await _content(response, url, remote.place, budget)
                text = _target(url, response.headers["location"], remote.place)
        raise _refusal(remote.place, f"the URL is redirected more than {MAX_REDIRECTS} times")

    @asynccontextmanager
    async def _response(self, url: httpx2.URL, place: str) -> AsyncGenerator[httpx2.Response, None]:
        """Open the response of the first public address of a URL's host that can be reached."""
        headers = {**REQUEST_HEADERS, "host": url.netloc.decode()}
        extensions = {"sni_hostname": url.raw_host.decode()}  # the certificate must be the host's
        error: httpx2.TransportError | None = None
        transport = httpx2.AsyncHTTPTransport(verify=self._ssl_context, trust_env=False)
        async with aclosing(transport):
            for address in await self._addresses(url, place):
                request = httpx2.Request("GET", url.copy_with(host=address), headers=headers, extensions=extensions)
                try:
                    response = await transport.handle_async_request(request)
                except httpx2.TransportError as transport_error:
                    error = transport_error
                    continue
                async with aclosing(response):
                    yield response
                return
        message = f"cannot fetch from `{url.netloc.decode():.100}`"
        raise _refusal(place, message, f"{type(error).__name__}: {error}") from error

    async def _addresses(self, url: httpx2.URL, place: str) -> list[str]:
        """Return the public addresses of a URL's host."""
        name = url.raw_host.decode()
        port = url.port or PORTS[url.scheme]
        try:
            addresses = await anyio.to_thread.run_sync(self._resolve, name, port, abandon_on_cancel=True)
        except (OSError, UnicodeError) as error:
            raise _refusal(place, f"the host `{name:.100}` cannot be found", str(error)) from error
        public = [address for address in addresses if self._is_public(address)]
        if not public:
            hint = f"it resolves to {', '.join(addresses)}"
            raise _refusal(place, f"the host `{name:.100}` has no public address; {SEND_DATA}", hint)
        return public

    @cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(NUM_THREADS)

    @cached_property
    def _ssl_context(self) -> SSLContext:
        return httpx2.create_ssl_context()


class _Budget:
    """Bytes that the images of one request may have together."""

    def __init__(self, max_bytes: int):
        self._max_bytes = self._remaining = max_bytes

    def check(self, count: int, place: str) -> None:
        """Refuse an image if more bytes are announced or received than remain.

        Raises:
            ApiError: 400.
        """
        if count > self._remaining:
            message = f"the images that this request names by URL have more than {format_bytes(self._max_bytes)}"
            raise _refusal(place, message, "--max-body changes the limit")

    def spend(self, count: int, place: str) -> None:
        """Subtract received bytes; errors as for `check`."""
        self.check(count, place)
        self._remaining -= count


async def _content(response: httpx2.Response, url: httpx2.URL, place: str, budget: _Budget) -> bytes:
    host = f"`{url.netloc.decode():.100}`"
    if response.status_code != 200:
        raise _refusal(place, f"{host} answered with status {response.status_code}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _refusal(place, f"{host} sent compressed data although none was accepted")
    length = response.headers.get("content-length", "")
    if length.isdecimal():
        budget.check(int(length), place)
    chunks: list[bytes] = []
    try:
        async for chunk in response.aiter_raw():
            budget.spend(len(chunk), place)
            chunks.append(chunk)
    except httpx2.TransportError as error:
        hint = f"{type(error).__name__}: {error}"
        raise _refusal(place, f"the connection to {host} ended before the image was complete", hint) from error
    return b"".join(chunks)


def _target(url: httpx2.URL, location: str, place: str) -> str:
    """Return the absolute URL of a redirect."""
    try:
        return str(url.join(location))
    except (httpx2.InvalidURL, ValueError) as error:
        raise _refusal(place, "the URL is redirected to an invalid one") from error


def _name(url: httpx2.URL) -> str:
    """Return the host of a URL; an IPv6 address in brackets, so that it differs from one with a port."""
    name = url.raw_host.decode().removesuffix(".")
    return f"[{name}]" if ":" in name else name


def _refusal(place: str, message: str, hint: str | None = None) -> ApiError:
    return ApiError(400, f"`{place}`: {message}", "invalid_value", place, hint=hint)

"""Requests to a server, and its errors as errors for the user."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

import httpx2

from kimi_mlx.client.address import ServerAddress
from kimi_mlx.client.server_json import parse_server_json
from kimi_mlx.errors import ServerError

CONNECT_S = 10.0
"""Time limit for a connection."""

WRITE_S = 60.0
"""Time in which a server must read a part of a request."""

SILENCE_S = 90.0
"""Time without a byte after which a server of ours is given up: it sends something every 5 s once a request is
prepared, which takes 60 s at most."""

OTHER_SILENCE_S = 600.0
"""The same for other servers, which may send nothing while they process a prompt; as in OpenAI's client."""

REPLY_S = 30.0
"""Time in which a server must answer a small request."""

MAX_EVENT_BYTES = 16 * 2**20
MAX_REPLY_BYTES = 16 * 2**20
MAX_ERROR_BYTES = 2**16

MAX_WAITING_EVENTS = 1000
"""Number of events that are read ahead; then the server must wait."""
POLL_S = 0.01

RETRY_HINT = "send the message again; `/retry` does it in a conversation"
KEY_HINT = "give the key in a file, `--api-key-file FILE`, or in $KIMI_MLX_API_KEY"


class BusyError(ServerError):
    """The server has no free slot for a request.

    Args:
        message: the server's error.
        retry_after_s: seconds after which to retry; None if the server does not tell.
    """

    def __init__(self, message: str, retry_after_s: float | None):
        super().__init__(message, hint="try again later")
        self.retry_after_s = retry_after_s


class MissingPathError(ServerError):
    """The server does not have this path (404 or 405)."""


class HttpClient:
    """Sends requests to one server.

    Args:
        address: address of the server.
        key: API key; None to send none.
        retry_hint: what to do after a lost connection.
    """

    def __init__(self, address: ServerAddress, key: str | None, retry_hint: str = RETRY_HINT):
        self.address = address
        self._retry_hint = retry_hint
        self._headers = {"user-agent": "kimi-mlx", "accept-encoding": "identity"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self._has_key = key is not None

    def get(self, path: str) -> Any:
        """Return the JSON at a path.

        Raises:
            ServerError: there is no server, or it refuses the request or answers with something else.
        """
        return self._exchange("GET", path, None, REPLY_S)

    def post(self, path: str, body: Mapping[str, Any], limit_s: float) -> Any:
        """Return the JSON that a path answers to a body.

        Args:
            path: path below the API's base.
            body: body of the request.
            limit_s: time limit of the answer.

        Raises:
            ServerError: as in get().
        """
        return self._exchange("POST", path, _encode(body), limit_s)

    def open_stream(self, path: str, body: Mapping[str, Any], silence_s: float) -> EventReader:
        """Send a request whose answer is a stream of server-sent events.

        Args:
            path: path below the API's base.
            body: body of the request.
            silence_s: time without a byte after which the server is given up.
        """
        return EventReader(self, path, _encode(body), silence_s)

    def new_connection(self, limit_s: float) -> httpx2.Client:
        """Return an HTTP client for one request, so that it can be cut without disturbing others.

        Args:
            limit_s: time limit of each read.
        """
        timeout = httpx2.Timeout(limit_s, connect=CONNECT_S, write=WRITE_S)
        try:
            # with a transport of its own, the client reads the variables of certificates but not those of proxies
            transport = httpx2.HTTPTransport() if self.address.is_local_network else None
            return httpx2.Client(headers=self._headers, timeout=timeout, transport=transport)
        except (OSError, ValueError, ImportError) as error:  # a proxy or a file of certificates that cannot be used
            raise ServerError(f"cannot connect to {self.address.url}: {error}") from error

    def describe(self, error: Exception, limit_s: float) -> ServerError:
        """Return an error of the connection as an error for the user.

        Args:
            error: error of the HTTP client.
            limit_s: time limit of each read.
        """
        url = self.address.url
        reason = str(error.__cause__ or error) or type(error).__name__
        if isinstance(error, httpx2.ConnectTimeout):
            return ServerError(f"no answer from {url} within {CONNECT_S:.0f} s", hint=_reach_hint(url))
        if isinstance(error, httpx2.ConnectError):
            return ServerError(f"cannot connect to {url}: {_plain_reason(reason)}", hint=_reach_hint(url))
        if isinstance(error, httpx2.ReadTimeout):
            return ServerError(f"nothing came from {url} for {limit_s:.0f} s", hint=self._retry_hint)
        if isinstance(error, httpx2.WriteTimeout | httpx2.WriteError):
            return ServerError(f"{url} does not accept the request: {reason}", hint=self._retry_hint)
        if isinstance(error, httpx2.NetworkError | httpx2.RemoteProtocolError):
            return ServerError(f"lost the connection to {url}", hint=self._retry_hint)
        return ServerError(f"{url} does not answer as an API server: {reason:.200}", hint=_reach_hint(url))

    def refusal(self, response: httpx2.Response, body: bytes) -> ServerError:
        """Return the error of a response with a body."""
        url, status = self.address.url, response.status_code
        message = _error_message(response, body)
        if status == 401:
            problem = "refuses this API key" if self._has_key else "needs an API key"
            return ServerError(f"{url} {problem}", hint=KEY_HINT)
        if status == 429:
            return BusyError(f"{url} is busy: {message}", _retry_after_s(response))
        if status in (404, 405):
            return MissingPathError(f"{url}: {message}", hint="check the address: `--url`")
        if 300 <= status < 400:
            location = response.headers.get("location", "")
            return ServerError(f"{url} has moved to {location:.200}", hint="use that address")
        hint = "try again later" if status >= 500 else None
        return ServerError(f"{url}: {message}", hint=hint)

    def _exchange(self, method: str, path: str, content: bytes | None, limit_s: float) -> Any:
        headers = {} if content is None else {"content-type": "application/json"}
        url, sockets = self.address.url, _Sockets(limit_s)
        try:
            with (
                contextlib.closing(sockets),
                contextlib.closing(self.new_connection(limit_s)) as client,
                client.stream(
                    method,
                    self.address.base + path,
                    content=content,
                    headers=headers,
                    extensions={"trace": sockets.trace},
                ) as response,
            ):
                if not response.is_success:
                    raise self.refusal(response, _read_body(response, MAX_ERROR_BYTES))
                body = _read_body(response, MAX_REPLY_BYTES)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self.describe(httpx2.ReadTimeout("") if sockets.is_late else error, limit_s) from error
        try:
            return parse_server_json(body)
        except ValueError as error:
            message = f"{url} does not answer as an API server: its answer is not JSON"
            raise ServerError(message, hint=_reach_hint(url)) from error


class EventReader:
    """Reads a stream of server-sent events in a thread, so that the reader can always be interrupted.

    Args:
        http: client of the server.
        path: path below the API's base.
        content: body of the request.
        silence_s: time without a byte after which the server is given up.
    """

    def __init__(self, http: HttpClient, path: str, content: bytes, silence_s: float):
        self._http, self._path, self._content, self._silence_s = http, path, content, silence_s
        self._items: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        self._is_closed = False
        self._sockets = _Sockets()
        threading.Thread(target=self._read, name="server-sent events", daemon=True).start()

    def take(self) -> str | None:
        """Wait for the data of the next event; return None after the end of the stream, or after close().

        Raises:
            ServerError: the server refuses the request, or the connection is lost.
        """
        item = None if self._is_closed else self._items.get()
        if isinstance(item, Exception) and not self._is_closed:
            raise item
        return item if isinstance(item, str) and not self._is_closed else None

    @property
    def is_closed(self) -> bool:
        """Whether close() was called."""
        return self._is_closed

    def close(self) -> None:
        """Cut the connection, at once, and wake take(). Safe in a signal handler and in any thread."""
        self._is_closed = True
        self._items.put(None)
        self._sockets.cut()

    def _read(self) -> None:
        try:
            self._read_events()
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            self._items.put(self._http.describe(error, self._silence_s))
        except Exception as error:  # the caller must not wait forever
            self._items.put(error)
        finally:
            self._items.put(None)

    def _read_events(self) -> None:
        with (
            contextlib.closing(self._http.new_connection(self._silence_s)) as client,
            client.sse(
                self._http.address.base + self._path,
                method="POST",
                content=self._content,
                headers={"content-type": "application/json"},
                extensions={"trace": self._sockets.trace},
                max_event_size=MAX_EVENT_BYTES,
            ) as source,
        ):
            if not source.response.is_success:
                raise self._http.refusal(source.response, _read_body(source.response, MAX_ERROR_BYTES))
            for event in source:
                while self._items.qsize() >= MAX_WAITING_EVENTS and not self._is_closed:
                    time.sleep(POLL_S)  # not a lock, which close() could not use in a signal handler
                self._items.put(event.data)


class _Sockets:
    """The sockets of a request, which can be cut from any thread and in a signal handler.

    Args:
        limit_s: time limit of the answer, after which they are cut; None for none.

    Attributes:
        is_late: whether the time limit has passed.
    """

    def __init__(self, limit_s: float | None = None):
        self.is_late = False
        self._is_cut = False
        self._open: list[socket.socket] = []
        self._timer = None if limit_s is None else threading.Timer(limit_s, self._end)

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Keep the socket of the connection; end the request if it was cut meanwhile. A hook of the HTTP client."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            found = info["return_value"].get_extra_info("socket")
            if isinstance(found, socket.socket):
                self._open.append(found)
        if event == "http11.send_request_body.complete" and self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        if self._is_cut:
            for open_socket in self._open:  # in the thread that reads; no one else has a socket that was just connected
                open_socket.close()
            raise httpx2.ReadError("the request was cancelled")

    def cut(self) -> None:
        """Cut the connection, at once."""
        self._is_cut = True
        for open_socket in self._open:
            with contextlib.suppress(OSError):  # not SSLSocket.shutdown, which is not safe while another thread reads
                socket.socket.shutdown(open_socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """End the time limit."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.is_late = True
        self.cut()


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode(errors="replace")


def _read_body(response: httpx2.Response, max_bytes: int) -> bytes:
    """Return a body, or its first bytes."""
    body = bytearray()
    for part in response.iter_bytes():
        body += part
        if len(body) > max_bytes:
            break
    return bytes(body[:max_bytes])


def _error_message(response: httpx2.Response, data: bytes) -> str:
    """Return the message of a refused request, in the forms of OpenAI's API, FastAPI and Ollama."""
    status = f"status {response.status_code} {response.reason_phrase}".rstrip()
    try:
        body: Any = parse_server_json(data)
    except ValueError:
        return status
    error: Any = cast("dict[str, Any]", body).get("error") if isinstance(body, dict) else None
    found: Any = cast("dict[str, Any]", error).get("message") if isinstance(error, dict) else error
    if found is None and isinstance(body, dict):
        fields = cast("dict[str, Any]", body)
        found = fields.get("detail") or fields.get("message")
    return str(found)[:1000] if found else status


def _retry_after_s(response: httpx2.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < 3600 else None


def _plain_reason(reason: str) -> str:
    """Return the reason of a failed connection without its number: `Connection refused`."""
    plain = reason.partition("] ")[2] or reason
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return f"its certificate is not trusted: {plain:.200}"
    return plain[:200].lower() if plain[:1].isupper() and plain[1:2].islower() else plain[:200]


def _reach_hint(url: str) -> str:
    if url.startswith("https://"):
        return "check the address, and set SSL_CERT_FILE if the server has a certificate of your own"
    address = httpx2.URL(url)
    if address.host in ("127.0.0.1", "::1", "localhost"):
        return f"check the port, and that a server runs there: `kimi-mlx serve MODEL --port {address.port or 80}`"
    return "check the address, and that a server runs there: `kimi-mlx serve MODEL --host 0.0.0.0 --api-key-file FILE`"

"""A server of pictures, for the tests of images by URL: a real HTTP server with faults, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from kimi_mlx.server.remote_images import ImageFetcher, normalize_host

IMAGE = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    """Answers by path; the paths of the requests and their headers are recorded."""

    requests: list[tuple[str, dict[str, str]]]
    image: bytes

    def do_GET(self) -> None:
        self.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        name, _, argument = self.path[1:].partition("/")
        getattr(self, f"answer_{name}")(argument)

    def answer_image(self, argument: str) -> None:
        self._send(200, self.image)

    def answer_unsized(self, argument: str) -> None:
        self._send(200, self.image * int(argument), has_length=False)

    def answer_sized(self, argument: str) -> None:
        self._send(200, self.image * int(argument))

    def answer_status(self, argument: str) -> None:
        self._send(int(argument), b"")

    def answer_redirect(self, argument: str) -> None:
        self._send(302, b"", location=argument)

    def answer_loop(self, argument: str) -> None:
        self._send(307, b"", location="/loop")

    def answer_compressed(self, argument: str) -> None:
        self._send(200, self.image, content_encoding="gzip")

    def answer_cut(self, argument: str) -> None:
        self._send(200, self.image[:-1], content_length=str(len(self.image)))

    def answer_slow_headers(self, argument: str) -> None:
        self._drip(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 10_000)

    def answer_slow_body(self, argument: str) -> None:
        self._drip(b"HTTP/1.1 200 OK\r\ncontent-length: 10000\r\n\r\n" + self.image)

    def answer_nonsense(self, argument: str) -> None:
        self.wfile.write(b"220 smtp.example ESMTP\r\n")

    def _send(self, status: int, body: bytes, *, has_length: bool = True, **headers: str) -> None:
        self.send_response(status)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if has_length:
            names.setdefault("content-length", str(len(body)))
        for name, value in names.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _drip(self, data: bytes) -> None:
        try:
            for at in range(len(data)):
                self.wfile.write(data[at : at + 1])
                time.sleep(0.02)
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


class PictureServer(ThreadingHTTPServer):
    """The server; its host names are resolved by the test."""

    daemon_threads = True

    def __init__(self, image: bytes) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        attributes = {"requests": self.requests, "image": image}
        super().__init__(("127.0.0.1", 0), type("PictureHandler", (Handler,), attributes))

    def url(self, path: str, host: str = "pictures.example") -> str:
        return f"http://{host}:{self.server_port}/{path}"

    def fetcher(self, max_bytes: int = 10**6, resolve: Callable[[str, int], list[str]] | None = None) -> ImageFetcher:
        """Return a fetcher that may connect to this machine."""
        hosts = [normalize_host(f"{name}:{self.server_port}") for name in ("pictures.example", "other.example")]
        return ImageFetcher(hosts, max_bytes, resolve or (lambda name, port: ["127.0.0.1"]), lambda address: True)


@contextmanager
def serving_pictures(image: bytes = IMAGE) -> Iterator[PictureServer]:
    """Serve a picture on several paths."""
    with PictureServer(image) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()

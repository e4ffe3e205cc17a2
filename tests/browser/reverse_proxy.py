"""A reverse proxy that serves another server below a path of its own, as `location /kimi/` of nginx does."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade"}


@contextmanager
def reverse_proxy(port: int, prefix: str, own_port: int = 0, *, keeps_host: bool = True) -> Iterator[str]:
    """Yield the URL of a proxy, with the prefix and without a slash at the end.

    Args:
        port: port of the other server on this machine.
        prefix: path of the proxy that is the root of the other server, such as `/kimi`.
        own_port: port of the proxy; 0 picks a free one.
        keeps_host: whether the Host header is passed on; otherwise it becomes that of the other server.
    """

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            if self.path == prefix:
                self.send_response(301)
                self.send_header("location", f"{prefix}/")
                self.end_headers()
                return
            if not self.path.startswith(f"{prefix}/"):
                self.send_error(404, "not below the prefix")
                return
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            if not keeps_host:
                headers["Host"] = f"127.0.0.1:{port}"
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as upstream:
                upstream.request(self.command, self.path.removeprefix(prefix), body or None, headers)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the browser has left
                    self.send_back(upstream.getresponse())

        def send_back(self, response: http.client.HTTPResponse) -> None:
            self.send_response_only(response.status, response.reason)
            for name, value in response.getheaders():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.end_headers()  # HTTP/1.0: the end of the connection ends the body
            while part := response.read1():
                self.wfile.write(part)
                self.wfile.flush()

        do_GET = do_POST = do_HEAD = forward

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", own_port), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
        server.shutdown()

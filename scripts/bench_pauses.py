#!/usr/bin/env python3
"""Benchmark of pauses: the longest pause of a running stream while another client sends a request that costs much work.

python scripts/bench_pauses.py                                  kimi-mini, all requests
python scripts/bench_pauses.py --only tools                     requests with `tools` in their names
python scripts/bench_pauses.py --images                         requests with images, for kimi-mini-vl
python scripts/bench_pauses.py --url http://127.0.0.1:8080      a running server of kimi-mini
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = "Examples:\n\n" + "\n\n".join((__doc__ or "").splitlines()[2:])

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# so that the server started by the benchmark finds the package
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

import kimi_mlx  # noqa: E402
from kimi_mlx.cli.output import print_json, stdout  # noqa: E402
from scripts.serving.heavy_bodies import CHAT, HI, HeavyRequest, heavy_requests  # noqa: E402
from scripts.serving.heavy_images import heavy_images  # noqa: E402
from scripts.serving.servers import ServerUnderTest, our_command, serving  # noqa: E402

MODELS = Path(kimi_mlx.__file__).parent / "models"
SETTLE_S = 2.0
"""Time before and after each request in which the stream is watched as well."""

LIMIT_S = 200.0
"""Time limit for the response to a request."""


@dataclass
class Stream:
    """A stream of tokens that is read in a thread. It is started again when it ends.

    Args:
        url: root URL of the server.
    """

    url: str
    gaps: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """End and length of the pauses of more than 0.05 s."""

    def start(self) -> None:
        """Start to read, and wait for the first token."""
        self._last = 0.0
        threading.Thread(target=self._run, daemon=True).start()
        while not self._last:
            time.sleep(0.01)

    def longest_pause_s(self, started_at: float) -> float:
        """Return the longest pause that ended after a time, including the one that has not ended yet."""
        return max([time.monotonic() - self._last, *(length for end, length in self.gaps if end > started_at)])

    def _run(self) -> None:
        with suppress(OSError, http.client.HTTPException):  # the server has ended
            while True:
                for _ in _tokens(self.url):
                    now = time.monotonic()
                    if self._last and now - self._last > 0.05:
                        self.gaps.append((now, now - self._last))
                    self._last = now


def _tokens(url: str) -> Iterator[bytes]:
    """Yield the lines of one long stream of text."""
    body = {"messages": HI, "max_tokens": 60_000, "stream": True, "temperature": 1.5}
    # without the tokens that end an answer, it runs to its limit
    body["logit_bias"] = {str(id): -100 for id in range(1536, 1792)}
    connection = _connect(url)
    connection.request("POST", CHAT, json.dumps(body).encode())
    response = connection.getresponse()
    while line := response.readline():
        if line.startswith(b"data: {"):
            yield line
    connection.close()


def _connect(url: str) -> http.client.HTTPConnection:
    address = urllib.parse.urlsplit(url)
    return http.client.HTTPConnection(address.hostname or "", address.port, timeout=LIMIT_S)


def send(url: str, path: str, body: bytes) -> tuple[str, float]:
    """Send a request; return its status, or the error, and the time to the whole response."""
    started = time.monotonic()
    try:
        connection = _connect(url)
        connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        status = str(response.status)
        if response.status != 200:
            status += f" {json.loads(text)['error']['message']:.70}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        status = type(error).__name__
    return status, time.monotonic() - started


def measure(server: ServerUnderTest, stream: Stream, request: HeavyRequest) -> dict[str, object]:
    """Send a request next to the stream, and a short one just after it; return a row of the report."""
    time.sleep(SETTLE_S)
    started = time.monotonic()
    results: list[tuple[str, float]] = []
    threads = [
        threading.Thread(target=lambda: results.append(send(server.url, request.path, request.body)))
        for _ in range(request.count)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    short_status, short_s = send(server.url, CHAT, json.dumps({"messages": HI, "max_tokens": 1}).encode())
    for thread in threads:
        thread.join()
    time.sleep(SETTLE_S)
    status, answered_s = max(results, key=lambda result: result[1])
    return {
        "request": request.name,
        "MB": round(len(request.body) * request.count / 1e6, 2),
        "pause_s": round(stream.longest_pause_s(started), 2),
        "answered_s": round(answered_s, 2),
        "short_s": round(short_s, 2),
        "status": status if short_status == "200" else f"{status}; short one: {short_status}",
    }


def main(
    url: Annotated[str | None, typer.Option("--url", help="Measure a running server.")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Only requests whose names contain this; repeatable.")
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="Send requests with images, to kimi-mini-vl.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the longest pause of a stream while other clients send requests that cost much work."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the server ends, too
    with ExitStack() as stack:
        command = our_command(MODELS / ("kimi-mini-vl" if images else "kimi-mini"))
        server = ServerUnderTest("server", url) if url else stack.enter_context(serving("server", command))
        stream = Stream(server.url)
        stream.start()
        stdout.print(f"{'request':42}{'MB':>8}{'pause s':>9}{'answer s':>10}{'short s':>9}  status", highlight=False)
        for request in heavy_images() if images else heavy_requests():
            if only is None or any(text in request.name for text in only):
                row = measure(server, stream, request)
                if json_output:
                    print_json(row)
                    continue
                stdout.print(
                    f"{row['request']:42}{row['MB']:>8}{row['pause_s']:>9}{row['answered_s']:>10}{row['short_s']:>9}"
                    f"  {row['status']}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=EXAMPLES)(main)
    app()

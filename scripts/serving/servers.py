"""Servers to measure: started here on a free port, or already running."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kimi_mlx.errors import EngineError

MLX_LM = "mlx-lm"
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class ServerUnderTest:
    """A server.

    Args:
        side: name of the server.
        url: root URL.
        pid: process id; None if it was not started here.
        api_key: API key, if it has one.
    """

    side: str
    url: str
    pid: int | None = None
    api_key: str | None = None

    def resident_bytes(self) -> list[int]:
        """Return the memory of its process; empty if it is not known."""
        if self.pid is None:
            return []
        result = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=False)
        return [int(result.stdout) * 1024] if result.stdout.strip() else []

    def health(self) -> dict[str, Any]:
        """Return its `/health` response; empty if there is none."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())
        except OSError:
            return {}

    def health_when_idle(self, timeout_s: float = 10) -> dict[str, Any]:
        """Return `/health` once nothing is running, or at the timeout. An abort takes effect after the current step."""
        ends_at = time.monotonic() + timeout_s
        while (health := self.health()).get("running") and time.monotonic() < ends_at:
            time.sleep(0.05)
        return health

    def is_answering(self) -> bool:
        """Whether it answers a small request."""
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0})
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", body.encode())
        try:
            with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as response:
                return "choices" in json.loads(response.read())
        except (OSError, ValueError):
            return False


def our_command(folder: Path, options: Sequence[str] = ()) -> list[str]:
    """Return the command of our server, without a port."""
    return [sys.executable, "-m", "kimi_mlx", "serve", str(folder), *options]


def mlx_lm_command(folder: Path, options: Sequence[str] = ()) -> list[str]:
    """Return the command of mlx-lm's server, without a port. It logs only warnings, which saves time."""
    return [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--log-level", "WARNING", *options]


@contextmanager
def serving(side: str, command: Sequence[str]) -> Iterator[ServerUnderTest]:
    """Start a server, wait until it answers, and stop it.

    Raises:
        EngineError: the server exits or does not answer.
    """
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            server = ServerUnderTest(side, f"http://127.0.0.1:{port}", process.pid)
            _wait(server, process, log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: ServerUnderTest, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
    """Wait for an answer to a request: mlx-lm reports good health before it has loaded the model."""
    ends_at = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < ends_at:
        health = server.health()
        if health and (health["status"] != "ok" or not server.is_answering()):
            break
        if health:
            return
        time.sleep(0.1)
    log.seek(0)
    last = log.read().decode("utf-8", "replace").strip().splitlines()[-1:]
    raise EngineError(
        f"the server of {server.side} does not answer: {last[0] if last else 'no output'}",
        hint=f"run `{shlex.join(process.args)}`",  # pyright: ignore[reportArgumentType]
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]

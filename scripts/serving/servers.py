"""Servers to be measured: started here on a port of their own, or running somewhere."""

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
START_LIMIT_S = 300
END_LIMIT_S = 30


@dataclass(frozen=True)
class ServerUnderTest:
    """A server that answers.

    Args:
        side: its name.
        url: of its root.
        pid: of its process; None if it was not started here.
        api_key: if it wants one.
    """

    side: str
    url: str
    pid: int | None = None
    api_key: str | None = None

    def resident_bytes(self) -> list[int]:
        """What its process holds in memory; nothing if that is not known."""
        if self.pid is None:
            return []
        found = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=False)
        return [int(found.stdout) * 1024] if found.stdout.strip() else []

    def health(self) -> dict[str, Any]:
        """What it says of itself; empty if it does not say."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())
        except OSError:
            return {}

    def health_when_idle(self, limit_s: float = 10) -> dict[str, Any]:
        """What it says of itself when nothing runs any more, or after this time; it needs a step to see an abort."""
        ends_at = time.monotonic() + limit_s
        while (health := self.health()).get("running") and time.monotonic() < ends_at:
            time.sleep(0.05)
        return health

    def answers(self) -> bool:
        """Whether it answers a small request."""
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0})
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", body.encode())
        try:
            with urllib.request.urlopen(request, timeout=START_LIMIT_S) as response:
                return "choices" in json.loads(response.read())
        except (OSError, ValueError):
            return False


def our_command(folder: Path, options: Sequence[str] = ()) -> list[str]:
    """Ours, without a port."""
    return [sys.executable, "-m", "kimi_mlx", "serve", str(folder), *options]


def mlx_lm_command(folder: Path, options: Sequence[str] = ()) -> list[str]:
    """mlx-lm's own server, without a port and with a log of warnings only, which spares it work."""
    return [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--log-level", "WARNING", *options]


@contextmanager
def serving(side: str, command: Sequence[str]) -> Iterator[ServerUnderTest]:
    """Start a server, wait until it answers, and end it.

    Raises:
        EngineError: it ends or stays silent.
    """
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            served = ServerUnderTest(side, f"http://127.0.0.1:{port}", process.pid)
            _wait(served, process, log)
            yield served
        finally:
            process.terminate()
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(served: ServerUnderTest, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
    """Until it has answered: mlx-lm's says that it is well before it has loaded anything."""
    ends_at = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < ends_at:
        health = served.health()
        if health and (health["status"] != "ok" or not served.answers()):
            break
        if health:
            return
        time.sleep(0.1)
    log.seek(0)
    last = log.read().decode("utf-8", "replace").strip().splitlines()[-1:]
    raise EngineError(
        f"the server of {served.side} does not answer: {last[0] if last else 'it says nothing'}",
        hint=f"try it: `{shlex.join(process.args)}`",  # pyright: ignore[reportArgumentType]
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]

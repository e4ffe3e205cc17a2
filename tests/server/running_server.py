"""A server in a thread of this process, on a port of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.http.server_socket import ServerSocket
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.server import Server, ServingOptions
from kimi_mlx.session.session import Session
from tests.fakes import KIMI_MINI


@dataclass(frozen=True)
class RunningServer:
    """A server that runs.

    Args:
        url: of its root.
        port: of its socket.
        server: itself.
    """

    url: str
    port: int
    server: Server

    def metric(self, name: str) -> float:
        """A figure of its metrics; 0 if it is not there yet. A request is counted when its answer has been sent."""
        status = self.server.service.status()
        lines = self.server.service.metrics.render(status, is_up=True).decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.split()[0] == name), 0)

    def wait_idle(self, limit_s: float = 10) -> None:
        """Until nothing runs and nothing waits."""
        ends_at = time.monotonic() + limit_s
        while self.server.service.running or self.server.service.waiting:
            assert time.monotonic() < ends_at, "answers are still running"
            time.sleep(0.01)


def wait_until(is_so: Callable[[], bool], limit_s: float = 20) -> None:
    """Wait for what comes a moment later."""
    ends_at = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < ends_at
        time.sleep(0.01)


@contextmanager
def serving(
    session: Session,
    options: ServingOptions | None = None,
    context_tokens: int | None = None,
    folder: Path = KIMI_MINI,
) -> Iterator[RunningServer]:
    """Serve kimi-mini. The session stays open.

    Args:
        session: loaded model.
        options: options of the server.
        context_tokens: context to announce; None is the model's own.
        folder: folder of the tokenizer.
    """
    context_tokens = context_tokens or load_config(folder).max_position_embeddings
    model_info = ModelInfo("kimi-mini", ("mini",), context_tokens, int(time.time()))
    server = Server(session, ChatTokenizer.load(folder), model_info, {}, options or ServingOptions())
    with closing(ServerSocket("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener.socket],), daemon=True)
        url, port = listener.url, listener.port
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield RunningServer(url, port, server)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

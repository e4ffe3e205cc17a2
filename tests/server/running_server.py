"""A server in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.http.server_socket import ServerSocket
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.server import Server, ServingOptions
from kimi_mlx.session.model_status import ModelDeployment
from kimi_mlx.session.session import Session
from tests.fakes import KIMI_MINI


@dataclass(frozen=True)
class RunningServer:
    """A running server.

    Args:
        url: URL of its root.
        port: port of its socket.
        server: server object.
    """

    url: str
    port: int
    server: Server

    def metric(self, name: str) -> float:
        """Return the value of a metric, or 0 if it does not exist yet; requests are counted after their responses."""
        status = self.server.service.status()
        lines = self.server.service.metrics.render(status, is_up=True).decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.split()[0] == name), 0)

    def wait_idle(self, timeout_s: float = 30) -> None:
        """Wait until no answer is running or waiting."""
        deadline = time.monotonic() + timeout_s
        while self.server.service.running or self.server.service.waiting:
            assert time.monotonic() < deadline, "answers are still running"
            time.sleep(0.01)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def serving(
    session: Session,
    options: ServingOptions | None = None,
    context_tokens: int | None = None,
    folder: Path = KIMI_MINI,
    ranks: int = 1,
    port: int = 0,
    aliases: Sequence[str] = ("mini",),
) -> Iterator[RunningServer]:
    """Serve kimi-mini. The session stays open.

    Args:
        session: loaded model.
        options: options of the server.
        context_tokens: size of the context; None uses the model's own.
        folder: folder of the tokenizer.
        ranks: number of ranks of the session.
        port: port to listen on; 0 picks a free one.
        aliases: other names of the model in requests.
    """
    context_tokens = context_tokens or load_config(folder).max_position_embeddings
    model_info = ModelInfo("kimi-mini", aliases, context_tokens, int(time.time()))
    deployment = ModelDeployment(
        "kimi-mini", "hybrid", local_cluster(ranks) if ranks > 1 else None, load_config(folder)
    )
    server = Server(session, ChatTokenizer.load(folder), model_info, {}, deployment, options or ServingOptions())
    with closing(ServerSocket("127.0.0.1", port)) as server_socket:
        thread = threading.Thread(target=server.run, args=([server_socket.socket],), daemon=True)
        url, port = server_socket.url, server_socket.port
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

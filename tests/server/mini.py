"""kimi-mini behind a real server, on a port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import kimi_mlx
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.session import SessionOptions, open_session
from kimi_mlx.runtime.text import ChatTokenizer
from kimi_mlx.server.listener import Listener
from kimi_mlx.server.served import Served
from kimi_mlx.server.serving import Server, ServingOptions

FOLDER = Path(kimi_mlx.__file__).parent / "models" / "kimi-mini"


@contextmanager
def serving(options: ServingOptions | None = None) -> Iterator[str]:
    """Serve it; gives the address."""
    served = Served("kimi-mini", (), load_config(FOLDER).max_position_embeddings, int(time.time()))
    with closing(Listener("127.0.0.1", 0)) as listener, closing(open_session(SessionOptions(FOLDER))) as session:
        server = Server(session, ChatTokenizer.load(FOLDER), served, {}, options or ServingOptions())
        thread = threading.Thread(target=server.run, args=([listener.socket],))
        thread.start()
        try:
            yield listener.url
        finally:
            server.should_exit = True
            thread.join()

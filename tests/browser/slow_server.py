"""Serve kimi-mini in a process of its own that can be killed: `python -m tests.browser.slow_server PORT SECONDS`."""

from __future__ import annotations

import sys
import threading
from contextlib import closing

import mlx.core as mx
import pytest

from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from tests.browser.servers import slow_down
from tests.fakes import KIMI_MINI
from tests.server.running_server import serving


def main(port: int, pause_s: float) -> None:
    mx.set_default_device(mx.cpu)  # pyright: ignore[reportArgumentType]
    with closing(open_session(SessionOptions(KIMI_MINI))) as session, pytest.MonkeyPatch.context() as patch:
        slow_down(patch, session, pause_s)
        with serving(session, port=port):
            print("try: slow", file=sys.stderr, flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))

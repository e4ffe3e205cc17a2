"""Signals that arrive while a session releases its memory wait until it is done."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from kimi_mlx.session.signals import defer_signals

INTERRUPTED_LOAD = """
import os, signal
import mlx.core as mx
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.session import SessionOptions
from tests.fakes import KIMI_MINI

held = []
def progress(done, total):
    if done == 3:
        held.append(mx.get_active_memory())
        os.kill(os.getpid(), signal.SIGINT)

try:
    LocalSession(SessionOptions(KIMI_MINI), progress)
except KeyboardInterrupt:
    print(held[0] > 1_000_000, mx.get_active_memory() < 1000)
"""


def test_signals_wait_for_the_end_of_the_block() -> None:
    order: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            order.append("released")
        order.append("not reached")
    assert order == ["released"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_changes_in_other_threads() -> None:
    results: list[str] = []

    def run() -> None:
        with defer_signals():
            results.append("done")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == ["done"]


def test_ctrl_c_while_a_model_loads_releases_what_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_LOAD], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr

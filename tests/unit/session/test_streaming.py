"""Sessions whose experts are read from the disk: errors of the disk, the end, and what is kept for the next start."""

from __future__ import annotations

import errno
import gc
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import WeightsError
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.uncached_file import UncachedFile
from tests.fakes import KIMI_MINI

OPTIONS = SessionOptions(KIMI_MINI, expert_memory=ExpertMemory.parse("40%"))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kimi-mlx"


def tokens_of(session: LocalSession, first: int = 20, length: int = 40) -> list[int]:
    events = list(session.generate(Request(tuple(range(first, first + length)), max_tokens=5)))
    assert isinstance(events[-1], Finished)
    return [event.id for event in events if isinstance(event, Token)]


def reading_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")}


@pytest.mark.slow
def test_an_unreadable_expert_fails_the_request_and_the_next_one_is_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(LocalSession(OPTIONS)) as session:
        expected = tokens_of(session)
        session.reset()

        def failing(self: UncachedFile, *args: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(UncachedFile, "read", failing)
        with pytest.raises(WeightsError, match=r"expert \d+ of layer \d: bytes \d+ to \d+ of `.*` cannot be"):
            tokens_of(session)
        assert "Input/output error" in str(session.status().reason)
        assert "Traceback" not in caplog.text
        monkeypatch.undo()
        assert tokens_of(session) == expected


def test_closing_releases_memory_and_threads() -> None:
    gc.collect()
    before_bytes, before_threads = mx.get_active_memory(), reading_threads()
    session = LocalSession(OPTIONS)
    tokens_of(session)
    assert reading_threads() - before_threads
    session.close()
    assert not reading_threads() - before_threads
    assert mx.get_active_memory() < before_bytes + 1000


@pytest.mark.slow
def test_closing_ends_reads_that_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    before_threads = reading_threads()
    session = LocalSession(OPTIONS)
    read, has_begun = UncachedFile.read, threading.Event()

    def slow(self: UncachedFile, *args: Any) -> int:
        has_begun.set()
        time.sleep(0.5)
        return read(self, *args)

    monkeypatch.setattr(UncachedFile, "read", slow)
    errors: list[object] = []
    session.submit(Request(tuple(range(20, 60)), max_tokens=200), errors.append)
    assert has_begun.wait(20)
    session.close()
    assert not session.status().is_up
    assert not reading_threads() - before_threads


@pytest.mark.slow
def test_what_was_learned_decides_what_is_kept_at_the_next_start(cache_folder: Path) -> None:
    with closing(LocalSession(OPTIONS)) as session:
        for _ in range(3):
            tokens_of(session)
            session.reset()
        engine = session._engine
        assert engine is not None
        streamer = engine._model.streamer
        assert streamer is not None
        rates = streamer.use.rates()
        del engine, streamer
    (path,) = cache_folder.glob("expert-use/*.npz")
    with closing(LocalSession(OPTIONS)) as session:
        engine = session._engine
        assert engine is not None
        streamer = engine._model.streamer
        assert streamer is not None
        owners = [sorted(experts.owners.tolist()) for experts in streamer.layers]
        popular = [np.argsort(-rate, kind="stable")[: len(kept)] for rate, kept in zip(rates, owners, strict=True)]
        assert owners == [sorted(best.tolist()) for best in popular]
        del engine, streamer
    path.write_bytes(b"damaged")
    with closing(LocalSession(OPTIONS)) as session:
        assert len(tokens_of(session)) == 5

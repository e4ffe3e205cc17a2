"""A history in a folder of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kimi_mlx.engine.events import Finished, FinishReason, Statistics
from kimi_mlx.history.log import ConversationLog
from kimi_mlx.history.store import HistoryStore

SETTINGS = {"system": "Be brief.", "sampling": {"temperature": 0.6}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    opened = HistoryStore.open(tmp_path / "history")
    yield opened
    opened.close()


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def open_log(store: HistoryStore, warnings: list[str]) -> Callable[[], ConversationLog]:
    return lambda: ConversationLog(store, "kimi-mini", lambda: SETTINGS, warnings.append)


@pytest.fixture
def log(open_log: Callable[[], ConversationLog]) -> ConversationLog:
    return open_log()


def finished(reason: FinishReason = "stop") -> Finished:
    return Finished(reason, Statistics(10, 4, 3, 0.5, 0.25, 1000))

"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.checkpoints import write_endless_checkpoint
from tests.terminal import Terminal

Spawn: TypeAlias = Callable[..., Terminal]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Starts programs on terminals; their state and data folders are the test's."""
    terminals: list[Terminal] = []
    folders = {"XDG_STATE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")}

    def start(code: str, *arguments: str, **settings: Any) -> Terminal:
        terminals.append(Terminal(code, *arguments, **{**folders, **settings}))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose greedy answers never end."""
    return write_endless_checkpoint(tmp_path_factory.mktemp("endless"))

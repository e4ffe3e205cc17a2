"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.terminal import Terminal

Spawn: TypeAlias = Callable[..., Terminal]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Starts programs on terminals; their state folder is the test's."""
    terminals: list[Terminal] = []

    def start(code: str, *arguments: str, **settings: Any) -> Terminal:
        terminals.append(Terminal(code, *arguments, **{"XDG_STATE_HOME": str(tmp_path), **settings}))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()

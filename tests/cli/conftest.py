"""Fixtures of the command line's tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from kimi_mlx.store.locate import ensure_downloaded
from tests.checkpoints import write_checkpoint
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
    """A checkpoint with random weights and kimi-mini's text: greedy, it never ends an answer."""
    mini = ensure_downloaded("kimi-mini")
    config = json.loads((mini / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.startswith("quantization")}
    folder = write_checkpoint(tmp_path_factory.mktemp("endless"), kept, seed=1)
    for name in ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(mini / name, folder)
    generation = json.loads((mini / "generation_config.json").read_text())
    del generation["kimi_mlx_max_tokens"]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder

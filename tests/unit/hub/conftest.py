"""A small model on a loopback hub that this process uses, with retries that hardly wait."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_mlx.hub import retries
from kimi_mlx.weights.index import INDEX_NAME
from tests.fakes import KIMI_MINI
from tests.hub import Hub, use

WEIGHT_MAP = {
    "language_model.model.embed_tokens.weight": "model-1-of-3.safetensors",
    "language_model.lm_head.weight": "model-2-of-3.safetensors",
    "vision_tower.encoder.weight": "model-3-of-3.safetensors",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder like a repository of Kimi K2.5: an index, three files (one for vision), and other files."""
    folder = tmp_path / "model"
    shutil.copytree(KIMI_MINI, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for number in (1, 2, 3):
        header = (2).to_bytes(8, "little") + b"{}"
        data = random.Random(number).randbytes(300_000 - len(header))
        (folder / f"model-{number}-of-3.safetensors").write_bytes(header + data)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": WEIGHT_MAP}))
    (folder / "modeling_deepseek.py").write_text("raise SystemExit")
    (folder / "figures").mkdir()
    (folder / "figures" / "extra.json").write_text("{}")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve `model` as `owner/model`."""
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 10.0)
    with Hub({"owner/model": model}) as hub:
        use(hub, tmp_path / "home", monkeypatch)
        yield hub

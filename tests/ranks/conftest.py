"""Fixtures for tests on real rings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.divisible import CONFIGS, write_divisible
from tests.fakes import KIMI_MINI


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the checkpoints by name."""
    root = tmp_path_factory.mktemp("divisible")
    return {"mini": KIMI_MINI} | {name: write_divisible(root, name, layers=5) for name in CONFIGS}

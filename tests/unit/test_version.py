"""The version is the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import kimi_mlx

ROOT = Path(__file__).resolve().parents[2]


def test_project_file_package_and_changelog_agree_on_the_version() -> None:
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    changes = re.search(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project is not None
    assert changes is not None
    assert project[1] == changes[1] == kimi_mlx.__version__

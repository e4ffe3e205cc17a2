"""Build hook of hatchling: put the commit into the wheel and the sdist, for `kimi-mlx --version`."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # pyright: ignore[reportMissingImports]

COMMIT_FILE = "kimi_mlx/commit.txt"


class CommitHook(BuildHookInterface):
    """Add the file with the commit; an sdist has it already, and an editable installation reads the clone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the file outside the clone, and tell hatchling its place in the package."""
        root = Path(self.root)
        if version == "editable" or (root / COMMIT_FILE).exists() or not (root / ".git").exists():
            return
        try:
            done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
        except FileNotFoundError:
            return
        if done.returncode == 0:
            self._folder = tempfile.TemporaryDirectory()
            file = Path(self._folder.name) / "commit.txt"
            file.write_text(done.stdout, encoding="ascii")
            build_data["force_include"][str(file)] = COMMIT_FILE

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the file."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()

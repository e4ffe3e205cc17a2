"""Clients from the npm registry, each installed once, in the user's cache folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

INSTALL_S = 600


def npm_folder(*packages: str) -> Path:
    """Return the `node_modules` folder with packages; skip the test if npm is missing.

    Args:
        packages: names with versions, `NAME@VERSION`.
    """
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "kimi-mlx-test-clients" / "+".join(packages).replace("/", "_")
    done = folder / "installed.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", *packages]
        subprocess.run(command, check=True, timeout=INSTALL_S, stdout=subprocess.DEVNULL)
        done.write_text(json.dumps(packages))
    return folder / "node_modules"

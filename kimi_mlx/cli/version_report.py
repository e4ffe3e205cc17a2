"""What `kimi-mlx --version` prints: the versions of kimi-mlx, MLX and Python, and the commit."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kimi_mlx.version import __version__

PACKAGE = Path(__file__).parents[1]
COMMIT_FILE = "commit.txt"
"""File in the package with the commit that a wheel was built from; `hatch_build.py` writes it."""


def versions() -> dict[str, str | None]:
    """Return the versions; None for a commit that is not known."""
    try:
        mlx = version("mlx")
    except PackageNotFoundError:
        mlx = None
    python = platform.python_version()
    return {"kimi-mlx": __version__, "commit": find_commit(PACKAGE), "mlx": mlx, "python": python}


def version_text() -> str:
    """Return the versions in one line."""
    found = versions()
    commit = "" if found["commit"] is None else f"commit {found['commit'][:12]}, "
    return f"kimi-mlx {found['kimi-mlx']} ({commit}MLX {found['mlx'] or 'missing'}, Python {found['python']})"


def find_commit(package: Path) -> str | None:
    """Return the commit of a package: that of its wheel, or that of the clone around it.

    This reads git's files: on a Mac without developer tools, the command `git` opens a window.
    """
    try:
        if (package / COMMIT_FILE).exists():
            return (package / COMMIT_FILE).read_text(encoding="ascii").strip() or None
        git = package.parent / ".git"
        if git.is_file():  # a worktree
            git = package.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        return _head(git)
    except (OSError, UnicodeDecodeError):
        return None


def _head(git: Path) -> str | None:
    """Return the commit that HEAD names, in a branch's own file or among the packed ones."""
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref:"):
        return head or None
    name = head.removeprefix("ref:").strip()
    common = git / (git / "commondir").read_text(encoding="utf-8").strip() if (git / "commondir").exists() else git
    if (common / name).exists():
        return (common / name).read_text(encoding="ascii").strip()
    packed = (common / "packed-refs").read_text(encoding="utf-8")
    found = re.search(rf"^([0-9a-f]+) {re.escape(name)}$", packed, re.MULTILINE)
    return None if found is None else found[1]

"""The command that adds a package to the environment in which this program runs."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path


def install_command(package: str) -> str:
    """Return the command that installs a package beside kimi-mlx, whichever program made the environment.

    Extras of kimi-mlx cannot be installed by name, because it is not on PyPI.
    """
    folders = Path(sys.prefix).parts
    package = shlex.quote(package)
    if "pipx" in folders:
        return f"pipx inject kimi-mlx {package}"
    python = shlex.quote(sys.executable)
    if find_spec("pip") is None:
        return f"uv pip install --python {python} {package}"
    return f"{python} -m pip install {package}"

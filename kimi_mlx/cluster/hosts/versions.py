"""What an interpreter has of kimi-mlx and MLX. As a text this is also the program that a host's interpreter runs.

Needs no kimi-mlx there, and Python 3.7: facts.py sends it with facts.sh, install.py with install.sh.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if place]  # not from the folder in which we happen to be

import contextlib
import json
import platform

PACKAGES = ("kimi-mlx", "mlx", "mlx-lm")
"""Whose versions are told."""


def describe(path: str) -> dict[str, str]:
    """The running interpreter, as kimi_mlx.cluster.hosts.facts.Interpreter has it; what is missing is left out.

    Versions come from the packages' metadata: importing MLX would cost a second, and may fail.

    Args:
        path: as it was called.
    """
    python = ".".join(map(str, sys.version_info[:3]))
    found = {"path": path, "python": python, "machine": platform.machine()}
    with contextlib.suppress(Exception):  # a Python that is too old or broken is told as what it is
        from importlib.metadata import version

        for name in PACKAGES:
            with contextlib.suppress(Exception):
                found[name] = version(name)
        code = code_digest()
        if code:
            found["code"] = code
    return found


def code_digest() -> str | None:
    """A digest of kimi-mlx's files; None without kimi-mlx."""
    import hashlib
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("kimi_mlx")
    if not spec or not spec.origin:
        return None
    root = Path(spec.origin).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        data = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    print("interpreter=" + json.dumps(describe(sys.argv[1])))

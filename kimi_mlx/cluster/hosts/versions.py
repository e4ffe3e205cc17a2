"""Versions of kimi-mlx and MLX in an interpreter. The source of this module also runs as a program on hosts.

There it needs Python 3.7 but not kimi-mlx; facts.py sends it with facts.sh, install.py with install.sh.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path[:] = [folder for folder in sys.path if folder]  # do not import from the current folder

import contextlib
import json
import platform
import re

PACKAGES = ("kimi-mlx", "mlx", "mlx-lm")
"""Packages whose versions are reported."""


def describe(path: str) -> dict[str, str]:
    """Describe the running interpreter with the fields of facts.Interpreter, without those that are unknown.

    Versions come from the packages' metadata, because importing MLX takes a second and may fail.

    Args:
        path: path by which the interpreter was started.
    """
    python = ".".join(map(str, sys.version_info[:3]))
    description = {"path": path, "python": python, "machine": platform.machine()}
    with contextlib.suppress(Exception):  # a Python that is too old or broken is still reported
        from importlib.metadata import version

        for name in PACKAGES:
            with contextlib.suppress(Exception):
                description[name] = version(name)
        code = code_digest()
        if code:
            description["code"] = code
        build = mlx_build()
        if build:
            description["mlx_build"] = build
    return description


def mlx_build() -> str | None:
    """Return the platform for which MLX's wheel was built, such as `macosx_26_0_arm64`; None if unknown.

    On a Mac the kernels are in mlx-metal.
    """
    from importlib.metadata import distribution

    for name in ("mlx-metal", "mlx"):
        with contextlib.suppress(Exception):
            tags = re.findall(r"^Tag: \S+-(\S+)$", distribution(name).read_text("WHEEL") or "", re.MULTILINE)
            if tags:
                return "/".join(sorted(set(tags)))
    return None


def code_digest() -> str | None:
    """Return a digest of kimi-mlx's files; None if kimi-mlx is not installed."""
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

"""The machine of a benchmark: hardware, load, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.version import __version__

OURS = "kimi-mlx"
PACKAGES = ("mlx", "mlx-lm")

GIT_TIMEOUT_S = 5


def machine() -> dict[str, Any]:
    """Return the machine and its load; before a benchmark, the load average should be near 0."""
    macos = platform.mac_ver()[0]
    return {
        "system": f"macOS {macos}" if macos else f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "device": mx.device_info().get("device_name", platform.processor()),
        "backend": str(mx.default_device().type).removeprefix("DeviceType."),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the relevant packages."""
    return {
        "python": platform.python_version(),
        OURS: __version__,
        **{name: version(name) for name in PACKAGES},
    }


def now() -> str:
    """Return date and time with time zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def commit() -> str | None:
    """Return the commit of this checkout, with `+` if files have changed; None if the package was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (_git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changes)


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True).stdout.strip()

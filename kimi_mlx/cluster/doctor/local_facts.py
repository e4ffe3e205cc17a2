"""The facts about this machine that cost nothing: memory and the GPU's limit, without ssh, a shell, or MLX.

macOS' commands are not yet tested on a Mac.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from kimi_mlx.cluster.hosts import probes
from kimi_mlx.cluster.hosts.facts import Facts

COMMAND_LIMIT_S = 10.0
"""Time limit of a command of macOS."""


def local_facts(host: str) -> Facts:
    """Return the memory of this machine and, on a Mac, what its GPU may wire.

    Args:
        host: name of this machine in findings.
    """
    system = platform.system()
    if system != "Darwin":
        meminfo = _read(Path("/proc/meminfo"))
        memory_bytes, free_bytes = (probes.meminfo(meminfo, name) for name in ("MemTotal", "MemAvailable"))
        return Facts(host, True, system=system, memory_bytes=memory_bytes, free_bytes=free_bytes)
    free_bytes, wired_bytes = probes.vm_stat(output_of("vm_stat"))
    return Facts(
        host,
        True,
        system=system,
        memory_bytes=probes.number(output_of("sysctl", "-n", "hw.memsize").strip()),
        free_bytes=free_bytes,
        wired_bytes=wired_bytes,
        wired_limit_mb=probes.number(output_of("sysctl", "-n", "iogpu.wired_limit_mb").strip()),
    )


def output_of(*command: str) -> str:
    """Return the output of a command; empty if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

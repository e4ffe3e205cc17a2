"""This machine: its chip, its memory, and what the GPU may have of it. Not yet seen on a Mac."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass

GPU_FRACTION = 0.75
"""Of the memory, what macOS lets the GPU wire by default; roughly, and less on small machines."""


@dataclass(frozen=True)
class LocalMachine:
    """A computer.

    Args:
        chip: such as `Apple M3 Ultra`.
        memory_bytes: all of it.
        gpu_bytes: what the GPU may wire of it.
        is_mac: whether it is one.
    """

    chip: str
    memory_bytes: int
    gpu_bytes: int
    is_mac: bool


def local_machine() -> LocalMachine:
    """The machine that we run on.

    Not yet seen on hardware: macOS' `iogpu.wired_limit_mb`, of which 0 stands for the default.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform != "darwin":
        return LocalMachine(platform.processor() or platform.machine(), memory, memory, is_mac=False)
    return LocalMachine(
        chip=_sysctl("machdep.cpu.brand_string") or platform.machine(),
        memory_bytes=memory,
        gpu_bytes=gpu_limit(memory, _sysctl("iogpu.wired_limit_mb")),
        is_mac=True,
    )


def gpu_limit(memory_bytes: int, wired_limit_mb: str | None) -> int:
    """What a Mac's GPU may wire.

    Args:
        memory_bytes: of the Mac.
        wired_limit_mb: what `sysctl -n iogpu.wired_limit_mb` printed; None if there is no such thing.
    """
    limit = int(wired_limit_mb) if wired_limit_mb is not None and wired_limit_mb.isdecimal() else 0
    return min(memory_bytes, limit * 1024**2) if limit else int(memory_bytes * GPU_FRACTION)


def _sysctl(name: str) -> str | None:
    """A value of macOS' kernel, None if it has no such one."""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

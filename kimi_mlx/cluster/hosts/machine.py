"""This machine: its chip, its memory, and the GPU's share of it. Not yet tested on a Mac."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass

GPU_FRACTION = 0.75
"""Approximate fraction of memory that macOS lets the GPU wire by default; less on small machines."""


@dataclass(frozen=True)
class LocalMachine:
    """Hardware of this machine.

    Args:
        chip: name of the chip, such as `Apple M3 Ultra`.
        memory_bytes: total memory.
        gpu_bytes: memory that the GPU may wire.
        is_mac: whether it is a Mac.
    """

    chip: str
    memory_bytes: int
    gpu_bytes: int
    is_mac: bool


def local_machine() -> LocalMachine:
    """Return the hardware of this machine.

    Not yet tested on hardware: macOS' `iogpu.wired_limit_mb`, where 0 means the default.
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
    """Return the number of bytes that a Mac's GPU may wire.

    Args:
        memory_bytes: total memory of the Mac.
        wired_limit_mb: output of `sysctl -n iogpu.wired_limit_mb`; None if the key does not exist.
    """
    limit = int(wired_limit_mb) if wired_limit_mb is not None and wired_limit_mb.isdecimal() else 0
    return min(memory_bytes, limit * 1024**2) if limit else int(memory_bytes * GPU_FRACTION)


def _sysctl(name: str) -> str | None:
    """Return a sysctl value; None if the key does not exist."""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

"""Memory that MLX can still use on this host."""

from __future__ import annotations

import os
import re
from pathlib import Path

import mlx.core as mx

from kimi_mlx.model.device import device_kind

MEMINFO = Path("/proc/meminfo")


def free_memory_bytes() -> int:
    """Return free memory.

    Metal: recommended working set minus active memory. CUDA: free memory of the device. CPU: MemAvailable, or half of
    the RAM.
    """
    kind = device_kind()
    if kind == "metal":
        return int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory()
    if kind == "cuda":
        return int(mx.device_info()["free_memory"]) + mx.get_cache_memory()
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        match = None
    if match:
        return int(match[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

"""Parse what commands of macOS and Linux print about a machine. Pure functions; None if the text does not match.

Formats: xnu's vm_stat, macOS' `top -l 1`, Apple's TN3205 (`ibv_devices`, `ibv_devinfo`), POSIX `df -P`, and Linux'
/proc/meminfo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def number(text: str | None) -> int | None:
    """Parse an unsigned integer."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None


def seconds(text: str | None) -> float | None:
    """Parse seconds since 1970, with or without a fraction."""
    return float(text) if text is not None and re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else None


def vm_stat(text: str) -> tuple[int | None, int | None]:
    """Parse the output of vm_stat into available bytes and wired bytes.

    Available are free pages, file-backed pages (which include the speculative ones, unlike the free pages) and
    purgeable pages.
    """
    page = re.search(r"page size of (\d+) bytes", text)
    counts = {name.strip('"'): int(count) for name, count in re.findall(r"^(.+?):\s+(\d+)\.?$", text, re.MULTILINE)}
    if page is None or "Pages free" not in counts:
        return None, None
    free = sum(counts.get(name, 0) for name in ("Pages free", "File-backed pages", "Pages purgeable"))
    wired = counts.get("Pages wired down")
    return free * int(page[1]), None if wired is None else wired * int(page[1])


MIN_PROCESSES = 50
"""Smallest plausible number of processes of a Mac, which has hundreds; `top` that lists fewer was interrupted."""

_UNITS = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def process_memory(text: str) -> int | None:
    """Parse the output of `top -l 1 -stats pid,mem` into the bytes of all processes except the kernel (pid 0).

    The column MEM is the physical footprint, which includes memory of the GPU, unlike the resident size of `ps`.
    """
    rows = re.findall(r"^ *(\d+)[*+-]* +(\d+)([BKMGT])[+-]?(?: .*)?$", text, re.MULTILINE)
    if len(rows) < MIN_PROCESSES:
        return None
    return sum(int(count) * 1024 ** _UNITS[unit] for pid, count, unit in rows if int(pid))


def meminfo(text: str, name: str) -> int | None:
    """Parse a line of /proc/meminfo, such as `MemTotal`, into bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def disk_free(text: str) -> int | None:
    """Parse the column `Available` of a line of `df -Pk` into bytes; its outer columns may contain blanks."""
    match = re.search(r"\s(\d+)\s+(\d+)\s+(-?\d+)\s+(?:\d+%|-)\s+/", text)
    return max(int(match[3]), 0) * 1024 if match else None


def firewall(text: str) -> int | None:
    """Parse the state from `socketfilterfw --getglobalstate`: 0 off, 1 on, 2 blocks all connections."""
    match = re.search(r"State = (\d)", text)
    return int(match[1]) if match else None


def rdma_ports(devices: str | None, details: str) -> Mapping[str, str] | None:
    """Parse RDMA devices and the states of their ports.

    Args:
        devices: output of `ibv_devices`; None if the command does not exist.
        details: output of `ibv_devinfo`.

    Returns:
        Device -> state, such as `PORT_ACTIVE`; empty if `ibv_devinfo` does not report it.
    """
    if devices is None:
        return None
    states: dict[str, str] = {}
    for block in re.split(r"^\s*hca_id:\s*", details, flags=re.MULTILINE)[1:]:
        state = re.search(r"^\s*state:\s+(\w+)", block, re.MULTILINE)
        states[block.split()[0]] = state[1] if state else ""
    return {name: states.get(name, "") for name in re.findall(r"^\s*(rdma_\w+)", devices, re.MULTILINE)}
